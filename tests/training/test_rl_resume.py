"""A run of RL that is killed, at whatever moment, and goes on is the straight run, to the bit."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import peft  # noqa: F401  it and the command are imported on use, in every life of a run anew
import pytest
import torch

import rftt_lightning.app.rl  # noqa: F401
from rftt_lightning.app.cli import main

ROOT = Path(__file__).resolve().parents[2]
STEPS = 8
KILLS = {"all": 10, "lora": 4}
BOTH = {
    "config": ROOT / "configs/tiny/rl.yaml",
    "model.model": "pkg:tiny/checkpoints/countdown",
    "model.lr": 0.003,
    "model.reference_reset": 3,
    "data.train.init_args.count": 40,
    "data.validation.init_args.count": 8,
    "data.batch_size": 6,
    "trainer.max_steps": STEPS,
    "trainer.mini_batches": 3,
    "trainer.epochs": 2,
    "trainer.checkpoint_every": 2,
    "trainer.validate_every": 3,
    "trainer.expander.init_args.rollouts": 4,
    "trainer.expander.init_args.max_tokens": 64,
    "trainer.filter_dead": "true",
    "trainer.refill": 1,
    "trainer.reward": json.dumps({"class_path": "scripted.LateReward", "init_args": {"wrong": 0.5}}),
}
VARIANTS = {"all": {}, "lora": {"model.trainable": "lora", "model.lora.rank": 4}}


def fit(out: Path, variant: str) -> int:
    settings = BOTH | VARIANTS[variant] | {"trainer.out": out}
    return main(["rl", "fit", *(f"--{name}={value}" for name, value in settings.items())])


def run(out: Path, variant: str) -> int:
    """Start a run in a process of its own; what it imports is there already."""
    child = os.fork()
    if not child:
        os._exit(fit(out, variant))
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_at_random(folder: Path, variant: str) -> None:
    """A straight run, and so often SIGKILL to one that goes on each time. One that ends meanwhile is followed by
    another, so that no kill comes too late. Writes down how long each life was."""
    began = time.monotonic()
    assert ended(run(folder / "straight", variant)) == 0
    whole = time.monotonic() - began
    chance, killed, number = random.Random(variant), [], 0
    while len(killed) < KILLS[variant]:
        child, born = run(folder / f"killed-{number}", variant), time.monotonic()
        life = chance.uniform(0, 0.6 * whole)
        while time.monotonic() - born < life and not os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            time.sleep(0.002)
        lived = time.monotonic() - born
        whole = min(whole, lived) if lived < life else whole  # the machine is freer now
        os.kill(child, signal.SIGKILL)
        if ended(child) == -signal.SIGKILL:
            lines = folder / f"killed-{number}" / "metrics.jsonl"
            killed.append([number, life, lines.read_bytes().count(b"\n") if lines.exists() else 0])
        else:
            number += 1
    assert ended(run(folder / f"killed-{number}", variant)) == 0
    (folder / "kills.json").write_text(json.dumps({"whole": whole, "number, life, steps logged": killed}))


def newest(out: Path) -> Path:
    return out / "checkpoints" / f"step-{STEPS:06d}.pt"


def same(one: object, other: object) -> bool:
    """Bitwise, of nested states."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.view(torch.uint8) if one.ndim else one, other.view(torch.uint8) if one.ndim else other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.slow
@pytest.mark.parametrize("variant", VARIANTS)
def test_killed_at_random_moments_a_run_is_the_straight_run(tmp_path, variant):
    code = f"from training.test_rl_resume import *; kill_at_random(Path({str(tmp_path)!r}), {variant!r})"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]
    straight, *killed = [tmp_path / "straight", *sorted(tmp_path.glob("killed-*"))]
    state = torch.load(newest(straight), weights_only=True)
    first = torch.load(tmp_path / "straight" / "checkpoints" / f"step-{STEPS - 2:06d}.pt", weights_only=True)
    assert not same(state["model"], first["model"])
    metrics = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["filtered"] for line in metrics) > 0 and max(line["problems"] for line in metrics) > 6
    for out in killed:
        assert (out / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
        assert same(torch.load(newest(out), weights_only=True), state)
        for folder in ("hf", "rollouts"):
            names = [path.name for path in sorted((straight / folder).iterdir()) if path.suffix != ".json"]
            assert names == [path.name for path in sorted((out / folder).iterdir()) if path.suffix != ".json"]
            for name in names:
                assert (out / folder / name).read_bytes() == (straight / folder / name).read_bytes()
