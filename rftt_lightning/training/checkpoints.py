"""The folder of an RL run, and reading what a run has saved."""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rftt_lightning.core.contracts import UserError

META = "meta.pt"
"""What Lightning's sharded checkpoints, which are folders, keep besides weights and optimizer states."""


def read(path: str | Path, mark: str, device: torch.device | str) -> dict[str, Any]:
    """A checkpoint with its tensors on ``device`` ("meta": none is read). ``mark`` is an entry that every checkpoint of its kind
    has. Raises :class:`UserError` if it cannot be read, or is of another kind."""
    file = Path(path) / META if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"no checkpoint at {path}; give a file of an earlier run, or none to begin anew")
    try:
        state = torch.load(file, map_location=device, weights_only=True, mmap=str(device) == "meta")
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(
            f"{path} is no checkpoint, or a damaged one; give a file of an earlier run, or none to begin anew"
        ) from error
    if not isinstance(state, dict) or mark not in state:
        raise UserError(f"{path} is no checkpoint of this command; give a file that it wrote, or none to begin anew")
    return state


def choose(ckpt_path: str | None, found: Sequence[Path], folder: str | Path) -> Path | None:
    """The checkpoint that is asked for, of those ``found`` in a run's ``folder``, the newest last: None is the newest if there is
    one, "last" (or "best", if those were looked for) insists on it, "none" is none, and anything else its own path. Raises
    :class:`UserError` if there is no such one."""
    if ckpt_path == "none":
        return None
    if ckpt_path not in (None, "last", "best"):
        return Path(ckpt_path)
    if ckpt_path and not found:
        raise UserError(f"there is no {ckpt_path} checkpoint in {folder}; leave ckpt_path out to begin there")
    return next(reversed(found), None)


class RunFolder:
    """``checkpoints/step-*.pt``, of which the newest ``keep`` stay; ``checkpoints/best-*.pt``, the weights that validated best;
    ``checkpoints/settings.pt``, by which a run is known before its first checkpoint; ``metrics.jsonl``, a line a step, the same in
    every run with the same settings on the same machine; ``times.jsonl``, which is not. Each file is whole or as it was, but for
    the last lines of the latter two."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self.keep = path, keep
        self.metrics, self.times = path / "metrics.jsonl", path / "times.jsonl"

    def checkpoints(self, kind: str = "step") -> list[Path]:
        """The newest last; ``kind`` is "step" or "best"."""
        return sorted((self.path / "checkpoints").glob(f"{kind}-*.pt"))

    def choose(self, ckpt_path: str | None) -> Path | None:
        """As the function of this name; "best" is the one that validated best."""
        return choose(ckpt_path, self.checkpoints("best" if ckpt_path == "best" else "step"), self.path)

    def save(self, steps: int, state: Mapping[str, Any]) -> None:
        """Write the checkpoint after ``steps`` steps, and forget the oldest."""
        self._write(f"step-{steps:06d}.pt", {"steps": steps, **state})
        for old in self.checkpoints()[: -self.keep]:
            old.unlink()
        oldest = steps_of(self.checkpoints()[0])
        known = [path for path in self.checkpoints("best") if steps_of(path) <= oldest]
        for beaten in known[:-1]:  # the last one is what a run that goes on at the oldest checkpoint has to beat
            beaten.unlink()

    def begin(self, settings: Mapping[str, Any]) -> None:
        """What is written from now on is of these settings."""
        self._write("settings.pt", {"settings": settings})

    def begun(self) -> dict[str, Any]:
        """The ``settings`` of what is written here; empty before the first step or tree: a run that came to nothing binds none that
        follows."""
        written = (*self.path.glob("metrics.jsonl"), *self.path.glob("rollouts/trees-*"))
        path = self.path / "checkpoints" / "settings.pt"
        return read(path, "settings", "meta") if path.exists() and any(x.stat().st_size for x in written) else {}

    def best(self) -> float:
        """The best validation accuracy so far, -1 before the first."""
        found = self.choose("best") if self.checkpoints("best") else None
        return float(read(found, "accuracy", "meta")["accuracy"]) if found else -1.0

    def save_best(self, steps: int, accuracy: float, state: Mapping[str, Any]) -> None:
        """Write the weights after ``steps`` steps, which validated better than all before."""
        self._write(f"best-{steps:06d}.pt", {"steps": steps, "accuracy": accuracy, **state})

    def _write(self, name: str, state: Mapping[str, Any]) -> None:
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        temporary = folder / "writing.tmp"
        with temporary.open("wb") as file:
            torch.save(dict(state), file)
            file.flush()
            os.fsync(file.fileno())  # the content reaches the disk before the name does
        temporary.replace(folder / name)
        entry = os.open(folder, os.O_RDONLY)
        os.fsync(entry)
        os.close(entry)

    def log(self, step: int, metrics: Mapping[str, float], times: Mapping[str, float]) -> None:
        for path, values in ((self.metrics, metrics), (self.times, times)):
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")
                file.flush()
                os.fsync(file.fileno())

    def rewind(self, steps: int) -> None:
        """Leave what the first ``steps`` steps wrote: later checkpoints and metrics are of a run that is replaced."""
        for later in (*self.checkpoints(), *self.checkpoints("best")):
            if steps_of(later) > steps:
                later.unlink()
        for path in (self.metrics, self.times):
            if path.exists():
                lines = path.read_text(encoding="utf-8").splitlines()
                kept = [
                    x for x in lines if x.endswith("}") and json.loads(x)["step"] < steps
                ]  # the last one may be torn
                temporary = path.with_suffix(".tmp")
                temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
                temporary.replace(path)


def steps_of(checkpoint: Path) -> int:
    """How many steps were done when it was written."""
    return int(checkpoint.stem.partition("-")[2])
