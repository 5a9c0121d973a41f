"""Two processes learn by RL what one does: where one of them, or both, must leave out all that they rolled out, where rewards hang
on what the other rolled out, and where one of them loses a service on the way."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rftt_lightning.tiny.countdown import Countdown
from rftt_lightning.training.problems import ProblemDataModule

ROOT = Path(__file__).resolve().parents[2]
BATCH = 4


BOTH = ("--trainer.devices=2", "--trainer.strategy=ddp")


def fit(out: Path, reward: dict, *options: str) -> subprocess.CompletedProcess[str]:
    """Three steps."""
    command, env = ask(out, reward, *options)
    return subprocess.run(command, capture_output=True, text=True, check=False, env=env, timeout=300)


def ask(out: Path, reward: dict, *options: str) -> tuple[list[str], dict[str, str]]:
    """The command, and its environment."""
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
    return [sys.executable, *map(str, command), *options], env


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

    down.touch()
    lost = fit(tmp_path / "two", reward, *BOTH)
    assert lost.returncode == 2 and "rftt: the service is down; start it, and run again" in lost.stderr
    assert "Traceback" not in lost.stderr and len(metrics(tmp_path / "two")) == 2
    assert [path.stem for path in (tmp_path / "two/checkpoints").glob("step-*")] == ["step-000002"]
    down.unlink()
    done = fit(tmp_path / "two", reward, *BOTH)
    assert done.returncode == 0, done.stderr[-3000:]
    for alone, together in zip(one, metrics(tmp_path / "two"), strict=True):
        assert together == pytest.approx(alone, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_signal_to_rank_zero_stops_both_and_its_status_says_so(tmp_path):
    """Fabric kills rank zero as soon as it sees that another rank has ended with a status."""
    out = tmp_path / "out"
    reward = {"problems": [], "lost": "", "down": str(tmp_path / "down")}
    command, env = ask(out, reward, *BOTH, "--trainer.max_steps=99")
    running = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=env)
    deadline = time.monotonic() + 240
    while not (out / "metrics.jsonl").exists() or not metrics(out):
        assert running.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    running.terminate()
    _, said = running.communicate(timeout=240)
    assert running.returncode == 130 and "interrupted" in said and "Traceback" not in said
    assert [path.stem for path in (out / "checkpoints").glob("step-*")] == [f"step-{len(metrics(out)):06d}"]
