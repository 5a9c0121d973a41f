"""Two processes learn by RL what one does: where one of them, or both, must leave out all that they rolled out, where rewards hang
on what the other rolled out, and where one of them loses a service on the way."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from rftt_lightning.tiny.countdown import Countdown
from rftt_lightning.training.problems import ProblemDataModule

ROOT = Path(__file__).resolve().parents[2]
BATCH = 4


def fit(out: Path, reward: dict, *options: str) -> subprocess.CompletedProcess[str]:
    """Three steps."""
    settings = {
        "model.model": "pkg:tiny/checkpoints/countdown",
        "data.train.init_args.count": 40,
        "data.validation.init_args.count": 5,
        "data.batch_size": BATCH,
        "trainer.out": out,
        "trainer.max_steps": 3,
        "trainer.mini_batches": 1,
        "trainer.expander.init_args.rollouts": 3,
        "trainer.expander.init_args.max_tokens": 48,
        "trainer.reward": json.dumps({"class_path": "scripted.LostReward", "init_args": reward}),
    }
    command = ["-m", "rftt_lightning", "rl", "fit", "--config", ROOT / "configs/tiny/rl.yaml"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return subprocess.run(
        [sys.executable, *map(str, command), *options],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        timeout=300,
    )


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_learn_what_one_does(tmp_path):
    """Verdicts on all of step 0 time out, and in step 1 those of the second process; in step 2 it loses the reward's service."""
    data = ProblemDataModule(Countdown("train", count=40), Countdown("validation", count=5), batch_size=BATCH)
    late = [problem.id for problem in (*data.batch(0), *data.batch(1)[1::2])]
    down = tmp_path / "down"
    reward = {"problems": late, "lost": data.batch(2)[1].id, "down": str(down)}
    assert fit(tmp_path / "one", reward).returncode == 0
    one = metrics(tmp_path / "one")
    assert [line["dropped"] for line in one] == [one[0]["rollouts"], one[1]["verdicts/timed_out"], 0]
    assert "loss" not in one[0] and 0 < one[1]["dropped"] < one[1]["rollouts"]

    both = ["--trainer.devices=2", "--trainer.strategy=ddp"]
    down.touch()
    lost = fit(tmp_path / "two", reward, *both)
    assert lost.returncode == 2 and "rftt: the service is down; start it, and run again" in lost.stderr
    assert "Traceback" not in lost.stderr and len(metrics(tmp_path / "two")) == 2
    assert [path.stem for path in (tmp_path / "two/checkpoints").glob("step-*")] == ["step-000002"]
    down.unlink()
    done = fit(tmp_path / "two", reward, *both)
    assert done.returncode == 0, done.stderr[-3000:]
    for alone, together in zip(one, metrics(tmp_path / "two"), strict=True):
        assert together == pytest.approx(alone, rel=1e-3, abs=1e-5)
