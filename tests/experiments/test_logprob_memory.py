"""The measurement of ``experiments/logprob-memory``, in small."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_measurement_runs_and_both_ways_agree(tmp_path):
    sizes = ["--vocabulary", "2000", "--hidden", "8", "--dense", "1", "--chunked", "1"]
    command = [sys.executable, ROOT / "experiments/logprob-memory/run.py", *sizes, "--out", tmp_path]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    compared, dense, chunked = json.loads((tmp_path / "results.json").read_text())
    assert all(size < 1e-5 for size in compared["largest difference"].values())
    assert dense["kind"] == "dense" and chunked["kind"] == "chunked" and min(dense["peak_gib"], chunked["peak_gib"]) > 0
