"""Reading what a run has saved."""

from __future__ import annotations

import pickle
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
