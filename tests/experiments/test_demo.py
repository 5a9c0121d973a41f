"""The demo end to end, small: every stage is a real command in a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ARMS = ("base", "sft", "rl", "rl_masked", "rl_no_warmup", "sampling")


def shrink(folder: Path) -> None:
    """Copies of configs/tiny with few problems and steps."""
    folder.mkdir()
    for path in (ROOT / "configs/tiny").glob("*.yaml"):
        config = yaml.safe_load(path.read_text())
        if path.stem in ("search", "curate"):
            config["source"]["init_args"]["count"] = 40
        if path.stem.startswith("evaluate"):
            config["source"]["init_args"]["count"] = 20
        if path.stem == "rl":
            config["data"]["train"]["init_args"]["count"] = 60
            config["data"]["validation"]["init_args"]["count"] = 10
            config["data"]["batch_size"] = 4
            config["trainer"].update(max_steps=3, checkpoint_every=1)
        if path.stem == "sft":
            config["trainer"]["max_epochs"] = 2
        (folder / path.name).write_text(yaml.safe_dump(config))


def demo(out: Path, world: Path, short: int = 2) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rftt_lightning", "sweep", "--config=experiments/demo/sweep.yaml", f"--out={out}"]
    command += [f"--variables.world={world}", f"--variables.short={short}"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_demo_runs_from_search_to_table_and_skips_what_is_done(tmp_path):
    shrink(tmp_path / "world")
    out = tmp_path / "out"
    first = demo(out, tmp_path / "world")
    assert first.returncode == 0, first.stdout[-3000:] + first.stderr[-3000:]
    results = json.loads((out / "results.json").read_text())["seed-0"]
    for arm in ARMS:
        row = results[arm]
        assert 0 <= row["low"] <= row["accuracy"] <= row["high"] <= 1 and row["n"] == 20
        assert sum(row["verdicts"].values()) == 20
        folder = out if arm == "base" else out / "seed-0"
        assert json.loads((folder / f"evaluate_{arm}" / "results.json").read_text())["greedy"] == row
    assert results["rl_masked"]["functional_tokens_per_answer"]["verify"] == 0
    assert sorted(map(int, results["rollouts"])) == [1, 2, 4, 8, 16]
    assert (out / "seed-0" / "evaluate_rl" / "accuracy.png").stat().st_size > 1000
    assert "RL without warm-up *" in first.stdout and "n = 16" in first.stdout
    stages = (out / "stages.json").read_text()
    again = demo(out, tmp_path / "world")
    assert again.returncode == 0 and "RL without warm-up *" in again.stdout
    assert (out / "stages.json").read_text() == stages  # nothing ran again
    other = demo(out, tmp_path / "world", short=3)
    assert other.returncode == 2 and "rl_no_warmup" in other.stderr and "other settings" in other.stderr
