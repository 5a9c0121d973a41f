"""``rftt sft fit --config configs/tiny/sft.yaml``: the SFT warm-up on the Trainer. Also validate."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

from lightning import Callback, LightningDataModule, LightningModule, Trainer
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.rank_zero import rank_zero_only

from rftt_lightning.app.command import make_folder, one_line
from rftt_lightning.app.fit import FitCLI
from rftt_lightning.core.contracts import UserError
from rftt_lightning.training import checkpoints
from rftt_lightning.training.callbacks import SaveAndStop
from rftt_lightning.training.data import TreeDataModule
from rftt_lightning.training.sft import SFTModule


class Forget(Callback):
    """Removes files when training starts."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        for file in self.files if trainer.is_global_zero else ():
            shutil.rmtree(file) if file.is_dir() else file.unlink()


def saved_in(out: str) -> list[Path]:
    """The checkpoints of a run, the newest last."""
    return sorted(Path(out).glob("checkpoints/*.ckpt"), key=lambda path: path.stat().st_mtime)


class SFTCLI(FitCLI):
    """``out`` is the run's folder: TensorBoard events, config.yaml, checkpoints/ and hf/ go there.

    A ``fit`` that is started again goes on: ``ckpt_path`` null is the newest of ``out/checkpoints`` if there is one, "last" insists
    on it, "none" begins anew. To ``validate``, null is the model as it is. SIGTERM and Ctrl-C let it finish its optimizer step and
    save ``out/checkpoints/interrupted.ckpt`` first; a second Ctrl-C stops it at once.
    """

    OUT: ClassVar[str] = "runs/sft"
    NAMED: ClassVar[tuple[str, ...]] = ("last", "none")

    def parse_arguments(self, parser: LightningArgumentParser, args: Sequence[str]) -> None:
        super().parse_arguments(parser, args)
        config = self.config[self.config.subcommand]
        asked, self.anew = config.ckpt_path, config.ckpt_path == "none"
        if asked or self.config.subcommand == "fit":
            path = checkpoints.choose(asked, saved_in(config.out), config.out)
            if path and asked in (None, "last"):  # one that was named has been looked at
                checkpoints.read(path, self.MARK, "meta")
            config.ckpt_path = str(path) if path else None
        self.asked = self.config.clone()

    def before_fit(self) -> None:
        self.trainer.callbacks.append(SaveAndStop())  # after ModelCheckpoint: what it saves last is the newest
        if self.anew:  # what is left behind must not be gone on from later; it stays until training really begins
            self.trainer.callbacks.append(Forget(saved_in(self.config_init.fit.out)))

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_argument("--out", type=str, default=self.OUT, help="folder of the run's results")
        parser.link_arguments("out", "trainer.default_root_dir")
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "model.seed", compute_fn=int)

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        skipped = {"model", "train_dataloaders", "val_dataloaders", "dataloaders", "datamodule"}
        return {"fit": skipped, "validate": skipped}

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        make_folder(self._get(self.config_init, "out"))
        if self._get(self.config_init, "trainer")["logger"] is None:
            kwargs["logger"] = TensorBoardLogger(self._get(self.config_init, "out"), name="", version="")
        trainer = super().instantiate_trainer(**kwargs)
        strategy, devices = trainer.strategy, trainer.num_devices * trainer.num_nodes
        if isinstance(strategy, ModelParallelStrategy):  # which would say so, in each process, when they all run
            data = trainer.num_nodes if strategy._data_parallel_size == "auto" else strategy._data_parallel_size
            tensor = trainer.num_devices if strategy._tensor_parallel_size == "auto" else strategy._tensor_parallel_size
            if data * tensor != devices:
                raise UserError(
                    f"trainer.strategy: data_parallel_size {data} x tensor_parallel_size {tensor} is not the number of devices, "
                    f"{devices}; set --trainer.strategy.init_args.data_parallel_size {devices} and tensor_parallel_size 1"
                )
        return trainer


def train(cli: type[FitCLI], module: type[LightningModule], data: type[LightningDataModule], args: list[str]) -> int:
    """Run a command whose subcommands are the Trainer's."""
    try:
        cli(
            module,
            data,
            args=args,
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
        )
    except MisconfigurationException as error:
        raise UserError(one_line(error)) from error
    except SystemExit as error:  # how the Trainer ends after Ctrl-C and SIGTERM
        # Rank zero tells of the latter. It would be killed by Lightning if it saw another rank end with a status.
        stopped = isinstance(error, SIGTERMException) and rank_zero_only.rank == 0
        if stopped or isinstance(error.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from error
        raise
    return 0


def main(args: list[str]) -> int | None:
    return train(SFTCLI, SFTModule, TreeDataModule, args)
