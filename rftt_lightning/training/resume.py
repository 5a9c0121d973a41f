"""What makes a run on Lightning's Trainer go on exactly where its checkpoint was written, or refuse to."""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from typing import Any, Generic, TypeVar

import lightning
import torch

from rftt_lightning.core.contracts import UserError
from rftt_lightning.search.expand import seed_of

BatchT = TypeVar("BatchT")


class Order(ABC, Generic[BatchT]):
    """An endless order of batches, one epoch an iteration, that resumes exactly: an epoch's order is a function of ``seed`` and its
    number. Without ``shuffle`` (validation) each iteration is whole."""

    def __init__(self, seed: int, shuffle: bool) -> None:
        self.seed, self.shuffle, self.epoch, self.done = seed, shuffle, 0, 0

    @property
    @abstractmethod
    def known(self) -> Mapping[str, Any]:
        """What must be the same for an order to go on: sizes, and a digest of the examples."""

    @abstractmethod
    def __len__(self) -> int:
        """Batches of one rank in an epoch."""

    @abstractmethod
    def batches(self, epoch: int, first: int) -> Iterator[BatchT]:
        """This rank's batches of an epoch, from the ``first`` on."""

    def __iter__(self) -> Iterator[BatchT]:
        """The batches that are left of the current epoch; of the next one if none is."""
        if not self.shuffle:
            yield from self.batches(0, 0)
            return
        if self.done >= len(self):
            self.epoch, self.done = self.epoch + 1, 0
        for batch in self.batches(self.epoch, self.done):
            self.done += 1
            yield batch

    @property
    def epochs(self) -> int:
        """Epochs that are over."""
        return self.epoch + (self.done >= len(self))

    def shuffled(self, epoch: int, count: int) -> list[int]:
        order = list(range(count))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        return order

    def state_dict(self) -> dict[str, Any]:
        """Where the order stands. Lightning keeps it in checkpoints."""
        return {"epoch": self.epoch, "done": self.done, **self._settings()}

    def _settings(self) -> dict[str, Any]:
        return {"seed": self.seed, **self.known, "batches": len(self)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on there. Raises :class:`UserError` if that was another order."""
        refuse_others("data", state, self._settings())
        self.epoch, self.done = state["epoch"], state["done"]


class OrderedData(lightning.LightningDataModule):
    """A data module whose training order goes on where a checkpoint left it. Lightning restores a stateful loader itself, but not
    if the loader was already asked for its length (as schedules do)."""

    def __init__(self) -> None:
        super().__init__()
        self.order: Order[Any] | None = None
        self._resumed: dict[str, Any] | None = None

    def resumable(self, order: Order[BatchT]) -> Order[BatchT]:
        """Remember the order of training, and let it go on."""
        self.order = order
        if self._resumed:
            order.load_state_dict(self._resumed)
        return order

    def state_dict(self) -> dict[str, Any]:
        return self.order.state_dict() if self.order else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict
        if self.order:
            self.order.load_state_dict(state_dict)


class ResumableModule(lightning.LightningModule):
    """A module on :class:`OrderedData` that goes on only with the settings it began with: optimizer and schedule keep the old ones,
    so others would act in part. It may go on for more epochs if its ``schedule`` is constant."""

    def on_train_start(self) -> None:
        self._stop_if_done()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Dropout is that of the straight run, too."""
        order = self.trainer.datamodule.order
        torch.manual_seed(seed_of(self.hparams.seed, order.epoch, order.done, self.trainer.global_rank))

    def on_train_epoch_end(self) -> None:
        self._stop_if_done()

    def _stop_if_done(self) -> None:
        """After a second resume the Trainer may have counted an epoch too few."""
        order, epochs = self.trainer.datamodule.order, self.trainer.max_epochs
        if order and epochs and 0 < epochs <= order.epochs:
            self.trainer.should_stop = True

    def _trainer_settings(self) -> dict[str, Any]:
        trainer = self.trainer
        settings = {
            name: getattr(trainer, name) for name in ("accumulate_grad_batches", "gradient_clip_val", "precision")
        }
        if self.hparams.schedule != "constant":
            settings |= {"max_epochs": trainer.max_epochs, "max_steps": trainer.max_steps}
        return settings

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["trainer"] = self._trainer_settings()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        refuse_others("model", checkpoint.get("hyper_parameters", {}), self.hparams)
        if self.trainer.state.fn == "fit":
            refuse_others("trainer", checkpoint.get("trainer", {}), self._trainer_settings())


def refuse_others(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Raise :class:`UserError` if a setting of a checkpoint is another now."""
    for key, value in new.items():
        if key in old and _plain(old[key]) != _plain(value):
            raise UserError(
                f"the checkpoint was written with {name}.{key}={old[key]}, now it is {value}; go on with the config.yaml beside it "
                "and the same data, or begin anew (another --out, or --ckpt_path none)"
            )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
