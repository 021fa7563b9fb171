"""The whole chain by one command, on generated shapes; a second run finds everything done."""

import os
import subprocess
import sys
from pathlib import Path

from tavq.eval.results import read_results

ROOT = Path(__file__).resolve().parent.parent


def recipe(run: Path) -> str:
    environment = os.environ | {"PRESET": "tiny", "RUN": str(run), "PYTHON": sys.executable}
    command = ["bash", str(ROOT / "recipes" / "flickr8k.sh")]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_the_recipe_trains_and_measures_everything_once(tmp_path):
    first = recipe(tmp_path)
    steps = [line for line in first.splitlines() if line.startswith("== ")]
    assert len(steps) == 11 and "done before" not in first
    weights = {path.parent.name for path in (tmp_path / "ready").glob("*/model.safetensors")}
    assert weights == {"tokenizer", "generator", "captioner"}
    assert read_results(tmp_path / "ready" / "results" / "caption.json").protocol["n"] == 60
    second = recipe(tmp_path)
    assert second.count("done before") == 10
