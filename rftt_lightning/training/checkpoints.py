"""The folder of an RL run, and reading what a run has saved."""

from __future__ import annotations

import json
import pickle
from collections.abc import Mapping
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
        raise UserError(f"no checkpoint at {path}; give a file of an earlier run, or null")
    try:
        state = torch.load(file, map_location=device, weights_only=True, mmap=str(device) == "meta")
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise UserError(f"{path} is no checkpoint, or a damaged one; give a file of an earlier run, or null") from error
    if not isinstance(state, dict) or mark not in state:
        raise UserError(f"{path} is no checkpoint of this command; give a file that it wrote, or null")
    return state


class RunFolder:
    """``checkpoints/step-*.pt``, of which the newest ``keep`` stay, and ``metrics.jsonl``, a line a step. Each file is whole or as
    it was, but for the last line of the metrics."""

    def __init__(self, path: Path, keep: int) -> None:
        self.path, self.keep = path, keep
        self.metrics = path / "metrics.jsonl"

    def checkpoints(self) -> list[Path]:
        """The newest last."""
        return sorted((self.path / "checkpoints").glob("step-*.pt"))

    def choose(self, ckpt_path: str | None) -> Path | None:
        """The checkpoint that is asked for: None is the newest if there is one, "last" insists on it, "none" is none. Raises
        :class:`UserError` if there is no last one."""
        if ckpt_path == "none":
            return None
        if ckpt_path not in (None, "last"):
            return Path(ckpt_path)
        if ckpt_path == "last" and not self.checkpoints():
            raise UserError(f"there is no checkpoint in {self.path}; leave ckpt_path out to begin there")
        return next(reversed(self.checkpoints()), None)

    def save(self, steps: int, state: Mapping[str, Any]) -> None:
        """Write the checkpoint after ``steps`` steps, and forget the oldest."""
        folder = self.path / "checkpoints"
        folder.mkdir(exist_ok=True)
        torch.save({"steps": steps, **state}, folder / "writing.tmp")
        (folder / "writing.tmp").replace(folder / f"step-{steps:06d}.pt")
        for old in self.checkpoints()[: -self.keep]:
            old.unlink()

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def rewind(self, steps: int) -> None:
        """Leave what the first ``steps`` steps wrote: later checkpoints and metrics are of a run that is replaced."""
        for later in self.checkpoints():
            if int(later.stem.removeprefix("step-")) > steps:
                later.unlink()
        if self.metrics.exists():
            lines = self.metrics.read_text(encoding="utf-8").splitlines()
            kept = [x for x in lines if x.endswith("}") and json.loads(x)["step"] < steps]  # the last one may be torn
            temporary = self.path / "metrics.tmp"
            temporary.write_text("".join(line + "\n" for line in kept), encoding="utf-8")
            temporary.replace(self.metrics)
