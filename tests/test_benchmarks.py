"""Benchmarks run through: what they measure changes often, and nothing else calls them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tavq.base.journal import read_journal

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_benchmark_of_memory_measures_every_command(tmp_path):
    journal = tmp_path / "scale.jsonl"
    command = [sys.executable, "benchmarks/scale.py", "--sizes", "64", "--batches", "2", "--steps", "1"]
    subprocess.run([*command, "--journal", str(journal)], cwd=ROOT, check=True, capture_output=True)
    rows = {row["case"]: row for row in read_journal(journal)}
    assert set(rows) == {"tokenize", "tokenizer", "generator", "captioner"}
    assert all(row["peak_mib"] > 50 and row["examples_per_s"] > 0 for row in rows.values())
