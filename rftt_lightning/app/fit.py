"""What the two training commands (sft, rl) share: a LightningCLI that says mistakes in one line and keeps what was asked."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, ClassVar

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback

from rftt_lightning.app.command import Parser, one_line, refuse_malformed
from rftt_lightning.core.contracts import UserError
from rftt_lightning.training import checkpoints


class FitParser(Parser, LightningArgumentParser):
    """Errors are :class:`UserError` s of one line."""


class SaveConfig(SaveConfigCallback):
    """Saves the config when training really starts: a run that is refused, or only validates, leaves the earlier one. It names no
    checkpoint, for that may be gone when the run is repeated."""

    def setup(self, *args: Any, **kwargs: Any) -> None:
        pass

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.config = self.config.clone()
        self.config["ckpt_path"] = None
        super().setup(trainer, pl_module, "fit")


class FitCLI(LightningCLI):
    """LightningCLI with :class:`FitParser` and :class:`SaveConfig`; what the user asked for is never changed in silence by the
    hyper-parameters in a checkpoint (LightningCLI merges them into the config)."""

    NAMED: ClassVar[tuple[str, ...]] = ("last",)
    """What ``ckpt_path`` may be besides a file."""
    MARK: ClassVar[str] = "pytorch-lightning_version"
    """Entry of every checkpoint that the command writes."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Lightning calls jsonargparse by names that it deprecates; nothing that a user could mend.
        os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
        save = {"save_config_callback": SaveConfig, "save_config_kwargs": {"overwrite": True}}
        super().__init__(*args, parser_class=FitParser, **save, **kwargs)

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:
        refuse_malformed(args)
        self.config = parser.parse_args(list(args))
        self.asked = self.config.clone()
        path, seed = (self.config[self.config.subcommand].get(name) for name in ("ckpt_path", "seed_everything"))
        if isinstance(seed, bool) or not 0 <= seed < 1 << 32:
            raise UserError(f"seed_everything is {seed}; use a number in 0..{(1 << 32) - 1}, which repeats the run")
        if path and path not in self.NAMED:
            checkpoints.read(path, self.MARK, "meta")

    def before_instantiate_classes(self) -> None:
        self.config = self.asked

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        try:
            return super().instantiate_trainer(**kwargs)
        except (MisconfigurationException, ValueError, TypeError, RuntimeError, ImportError) as error:
            raise UserError(f"trainer: {one_line(error)}") from error
