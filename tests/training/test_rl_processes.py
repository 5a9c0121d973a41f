"""Two processes learn by RL what one does, also where one of them, or both, must leave out all that they rolled out."""

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


def fit(out: Path, late: list[str], *options: str) -> list[dict]:
    """Metrics of three steps in which the verdicts on these problems time out."""
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
        "trainer.reward": json.dumps({"class_path": "scripted.LateReward", "init_args": {"problems": late}}),
    }
    command = ["-m", "rftt_lightning", "rl", "fit", "--config", ROOT / "configs/tiny/rl.yaml"]
    command += [f"--{name}={value}" for name, value in settings.items()]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    done = subprocess.run(
        [sys.executable, *map(str, command), *options],
        capture_output=True,
        text=True,
        check=False,
        env=env,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_two_processes_learn_what_one_does_where_verdicts_time_out(tmp_path):
    data = ProblemDataModule(Countdown("train", count=40), Countdown("validation", count=5), batch_size=BATCH)
    both, second = data.batch(0), data.batch(1)[1::2]  # all of step 0; in step 1 those of the second process
    late = [problem.id for problem in (*both, *second)]
    one = fit(tmp_path / "one", late)
    two = fit(tmp_path / "two", late, "--trainer.devices=2", "--trainer.strategy=ddp")
    assert [line["dropped"] for line in one] == [one[0]["rollouts"], one[1]["verdicts/timed_out"], 0]
    assert "loss" not in one[0] and 0 < one[1]["dropped"] < one[1]["rollouts"]
    for alone, together in zip(one, two, strict=True):
        assert together == pytest.approx(alone, rel=1e-3, abs=1e-5)
