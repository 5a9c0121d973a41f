"""What the two training commands (sft, rl) share: a LightningCLI that says mistakes in one line and keeps what was asked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, NoReturn

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI

from rftt_lightning.app.command import one_line, refuse_malformed
from rftt_lightning.core.contracts import UserError


class FitParser(LightningArgumentParser):
    """Errors are :class:`UserError` s of one line."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(one_line(message)) from ex


class FitCLI(LightningCLI):
    """LightningCLI with :class:`FitParser`; the saved ``config.yaml`` may be replaced, and what the user asked for is never
    changed in silence by the hyper-parameters in a checkpoint (LightningCLI merges them into the config)."""

    NAMED: ClassVar[tuple[str, ...]] = ("last", "best")
    """What ``ckpt_path`` may be besides a file."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Lightning calls jsonargparse by names that it deprecates; nothing that a user could mend.
        os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        kwargs.setdefault("save_config_kwargs", {"overwrite": True})
        super().__init__(*args, parser_class=FitParser, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:
        refuse_malformed(args)
        self.config = parser.parse_args(list(args))
        self.asked = self.config.clone()
        path = self.config[self.config.subcommand].get("ckpt_path")
        if path and path not in self.NAMED and not Path(path).exists():
            raise UserError(f"no checkpoint at {path}; give a .ckpt file of an earlier run, or null")

    def before_instantiate_classes(self) -> None:
        self.config = self.asked

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError) as error:
            raise UserError(f"trainer: {one_line(error)}") from error
