"""A run of RL that is killed or asked to stop, at whatever moment, and goes on is the straight run, to the bit."""

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
from rftt_lightning.app.cli import INTERRUPTED, main

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
VARIANTS = {
    "all": {},
    "lora": {"model.trainable": "lora", "model.lora.rank": 4},
    "rare": {"trainer.checkpoint_every": STEPS},
}


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


def ask_to_stop(folder: Path) -> None:
    """A straight run, and one that gets a signal when it has logged a step, goes on, and gets the other signal then."""
    assert ended(run(folder / "straight", "rare")) == 0
    out, steps = folder / "stopped", 0
    lines = out / "metrics.jsonl"
    for kind in (signal.SIGTERM, signal.SIGINT):
        child = run(out, "rare")
        while not lines.exists() or lines.read_bytes().count(b"\n") <= steps:
            time.sleep(0.002)
        os.kill(child, kind)
        assert ended(child) == INTERRUPTED, kind
        steps = lines.read_bytes().count(b"\n")
        assert steps < STEPS and newest(out, steps).exists() and not newest(out).exists()
    assert ended(run(out, "rare")) == 0


def newest(out: Path, steps: int = STEPS) -> Path:
    return out / "checkpoints" / f"step-{steps:06d}.pt"


def same(one: object, other: object) -> bool:
    """Bitwise, of nested states."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one.view(torch.uint8) if one.ndim else one, other.view(torch.uint8) if one.ndim else other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(value, other[key]) for key, value in one.items())
    if isinstance(one, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


def in_a_process(call: str) -> None:
    """Run a function of this file in a process of its own, which forks before it has any thread."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, "-c", f"from training.test_rl_resume import *; {call}"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3000)
    assert done.returncode == 0, done.stderr[-3000:]


def check_same(straight: Path, out: Path) -> None:
    """What two runs leave behind is the same, bitwise."""
    assert (out / "metrics.jsonl").read_bytes() == (straight / "metrics.jsonl").read_bytes()
    assert same(*(torch.load(newest(folder), weights_only=True) for folder in (out, straight)))
    for folder in ("hf", "rollouts"):
        names = [path.name for path in sorted((straight / folder).iterdir()) if path.suffix != ".json"]
        assert names == [path.name for path in sorted((out / folder).iterdir()) if path.suffix != ".json"]
        for name in names:
            assert (out / folder / name).read_bytes() == (straight / folder / name).read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("variant", KILLS)
def test_killed_at_random_moments_a_run_is_the_straight_run(tmp_path, variant):
    in_a_process(f"kill_at_random(Path({str(tmp_path)!r}), {variant!r})")
    straight, *killed = [tmp_path / "straight", *sorted(tmp_path.glob("killed-*"))]
    state = torch.load(newest(straight), weights_only=True)
    first = torch.load(newest(straight, STEPS - 2), weights_only=True)
    assert not same(state["model"], first["model"])
    metrics = [json.loads(line) for line in (straight / "metrics.jsonl").read_text().splitlines()]
    assert sum(line["filtered"] for line in metrics) > 0 and max(line["problems"] for line in metrics) > 6
    for out in killed:
        check_same(straight, out)


@pytest.mark.slow
def test_asked_to_stop_a_run_saves_its_step_and_goes_on_as_the_straight_run(tmp_path):
    in_a_process(f"ask_to_stop(Path({str(tmp_path)!r}))")
    check_same(tmp_path / "straight", tmp_path / "stopped")
