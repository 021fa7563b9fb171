"""benchmarks/chaos.py: commands that are killed at random moments end as if nothing had happened."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from safetensors.numpy import save_file

from .conftest import ROOT


@pytest.fixture(scope="module")
def jobs() -> ModuleType:
    place = importlib.util.spec_from_file_location("chaos_jobs", ROOT / "benchmarks" / "chaos_jobs.py")
    module = importlib.util.module_from_spec(place)
    sys.modules[place.name] = module  # where dataclasses looks its fields up
    place.loader.exec_module(module)
    return module


def test_lost_doubled_and_changed_rows_are_named(jobs, tmp_path):
    whole, killed = tmp_path / "whole.jsonl", tmp_path / "killed.jsonl"
    rows = [json.dumps({"image": name, "caption": "a dog"}) + "\n" for name in "abc"]
    whole.write_text("".join(rows))
    for lines, difference in (
        (rows[::-1], ""),
        (rows[:2], "c is missing (1 in all)"),
        ([*rows, rows[0]], "1 rows are doubled"),
        ([*rows[:2], rows[2].replace("dog", "cat")], "c differs (1 in all)"),
    ):
        killed.write_text("".join(lines))
        assert jobs.same_rows(whole, killed) == difference


def test_one_changed_bit_of_weights_optimizer_or_losses_is_named(jobs, tmp_path):
    def write(folder: Path, weights: float, moments: float, loss: float) -> Path:
        (folder / "training" / "state").mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text("{}")
        save_file({"a": np.float32([weights])}, folder / "model.safetensors")
        save_file({"m": np.float32([moments])}, folder / "training" / "state" / "optimizer.safetensors")
        line = {"step": 1, "loss": loss, "examples_per_s": float(len(folder.name))}
        (folder / "training" / "log.jsonl").write_text(json.dumps(line) + "\n")
        return folder

    whole = write(tmp_path / "whole", 1.0, 1.0, 1.0)
    after = float(np.nextafter(np.float32(1), np.float32(2)))
    for values, difference in (
        ((1.0, 1.0, 1.0), ""),
        ((after, 1.0, 1.0), "model.safetensors: a differs (1 in all)"),
        ((1.0, after, 1.0), "training/state/optimizer.safetensors: m differs (1 in all)"),
        ((1.0, 1.0, after), "log.jsonl differs"),
    ):
        assert jobs.same_run(whole, write(tmp_path / "killed", *values)) == difference


@pytest.mark.slow
def test_ten_kills_of_the_cheapest_commands(tmp_path):
    command = [sys.executable, str(ROOT / "benchmarks" / "chaos.py"), "--kills", "10", "--no-faults"]
    command += ["--only", "describe", "index", "--out", str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert sum(result["kills"] for result in results.values()) == 10
    assert all(chain["difference"] == "" for result in results.values() for chain in result["chains"])
    assert "10 kills, seed 0." in done.stdout
