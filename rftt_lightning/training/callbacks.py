"""Callbacks of the SFT run: what the model writes, which functional tokens it uses, the export, and stopping when asked to."""

from __future__ import annotations

import shutil
import signal
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils.tensorboard import SummaryWriter
from transformers import PreTrainedModel

from rftt_lightning.core.contracts import QUESTION, Message, Problem, Request, Sampling, Step, UserError
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.policy.vocab import save


class Samples(Callback):
    """After each validation: greedy answers to validation problems as text, and how often each functional token is used in
    them, as scalars (uses an answer) and as a histogram over the table's order. The data's own use is logged at the start.

    Left out where weights are sharded: ranks would wait for each other.

    Args:
        count: problems answered.
        shown: of these, how many are logged as text.
        max_tokens: longest answer.
        max_segment_tokens: longest segment.
    """

    def __init__(self, count: int = 16, shown: int = 4, max_tokens: int = 256, max_segment_tokens: int = 128) -> None:
        self.count, self.shown, self.max_tokens = count, shown, max_tokens
        self.sampling = Sampling(temperature=0.0, boundary="argmax", max_segment_tokens=max_segment_tokens)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if writer := _writer(trainer):
            paths = (trajectory.steps for trajectory in trainer.datamodule.train)
            log_use(writer, "data", paths, pl_module.table, trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        writer = _writer(trainer)
        whole = isinstance(trainer.strategy, (SingleDeviceStrategy, DDPStrategy))
        if writer is None or not whole or trainer.sanity_checking:
            return
        problems: dict[str, Problem] = {}
        for trajectory in trainer.datamodule.validation:  # read from the disk, as far as need be
            problems.setdefault(trajectory.problem.id, trajectory.problem)
            if len(problems) >= self.count:
                break
        answered = self.answer(pl_module, list(problems.values()))
        log_use(writer, "samples", [path for _, path in answered], pl_module.table, trainer.global_step)
        for i, (problem, path) in enumerate(answered[: self.shown]):
            text = f"{problem.question}\n\n{pl_module.table.render(path)}\n\n(gold: {problem.answer})"
            writer.add_text(f"samples/{i}", text.replace("<", "&lt;"), trainer.global_step)

    def answer(self, module: LightningModule, problems: Sequence[Problem]) -> list[tuple[Problem, list[Step]]]:
        """Each problem with the answer to it; those that leave the model no room are left out."""
        backend = HFBackend.live(module.model, module.tokenizer, module.table, cache_gb=0.0)  # none is read twice
        prompts = [backend.chat([Message("user", problem.question)]) for problem in problems]
        rooms = [min(self.max_tokens, backend.limit - len(prompt)) for prompt in prompts]
        requests = {
            i: Request(prompt, seed=i, max_tokens=room, sampling=self.sampling, after=QUESTION, segments=0)
            for i, (prompt, room) in enumerate(zip(prompts, rooms, strict=True))
            if room > 0
        }
        completions = backend.generate(list(requests.values()))
        paths = ([segment.step for segment in completion.segments] for completion in completions)
        return [(problems[i], path) for i, path in zip(requests, paths, strict=True)]


class ExportHF(Callback):
    """At the end of training writes model and tokenizer as a Hugging Face folder; any strategy.

    Args:
        folder: where to; None is ``hf`` in the run's output folder.
        dtype: of the exported weights, "bfloat16" say; None keeps the trained ones.
    """

    def __init__(self, folder: str | None = None, dtype: str | None = None) -> None:
        if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise UserError(f"ExportHF: dtype is {dtype!r}; use float32, bfloat16, float16 or null")
        self.folder, self.dtype, self.trained = folder, dtype, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._target(trainer).is_file():  # Transformers would only log it, after all the training
            raise UserError(f"ExportHF: {self._target(trainer)} is a file; give a folder")

    def _target(self, trainer: Trainer) -> Path:
        return Path(self.folder or Path(trainer.default_root_dir) / "hf")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """A finished run that goes on is not trained any more, though it may have been killed before its export."""
        if not self.trained:
            self.on_train_end(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        model, folder = pl_module.model, self._target(trainer)
        weights = self._whole(model, trainer.is_global_zero)
        if not trainer.is_global_zero:
            return
        save(model, pl_module.tokenizer, folder, weights, self.dtype)
        print(f"model: {folder}")

    def _whole(self, model: PreTrainedModel, keep: bool) -> dict[str, Tensor]:
        """The model's weights on the CPU if they are to be kept, gathered tensor by tensor where they are sharded (all ranks take
        part). Those tied to others are left out: sharding hides that they are the same."""
        weights = {}
        # Not those that the strategy gives: their shards lie on the CPU, where NCCL gathers none.
        for name, weight in model.state_dict().items():
            if name in model.all_tied_weights_keys:
                continue
            whole = weight.full_tensor() if isinstance(weight, DTensor) else weight
            if keep:
                dtype = getattr(torch, self.dtype) if self.dtype and whole.is_floating_point() else whole.dtype
                weights[name] = whole.to("cpu", dtype)
        return weights


class SaveAndStop(Callback):
    """SIGTERM and Ctrl-C end training after the optimizer step under way, on all ranks, which save ``checkpoints/interrupted.ckpt``
    in the run's output folder together; a second Ctrl-C stops at once. The Trainer's own answer to SIGTERM saves nothing, may come
    amid accumulated batches, and has ranks wait for each other within the handler."""

    def __init__(self) -> None:
        self.asked, self.step = False, 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.step = trainer.global_step
        for kind in (signal.SIGTERM, signal.SIGINT):
            signal.signal(kind, self._ask)  # the Trainer's teardown puts back what was there before

    def _ask(self, number: int, frame: Any) -> None:
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = True

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step:  # more batches are to be accumulated
            return
        self.step = trainer.global_step
        if not trainer.strategy.reduce_boolean_decision(self.asked, all=False):
            return
        path = Path(trainer.default_root_dir) / "checkpoints" / "interrupted.ckpt"
        temporary = path.with_suffix(".tmp")  # sharded, it is a folder: nobody is to go on from half of it
        trainer.save_checkpoint(temporary)
        if trainer.is_global_zero:
            if path.is_dir():
                shutil.rmtree(path)
            temporary.replace(path)
        raise SIGTERMException


def log_use(writer: SummaryWriter, name: str, paths: Iterable[Sequence[Step]], table: TokenTable, step: int) -> None:
    """Uses of each functional token an answer, and their histogram by place in the table."""
    used, answers = Counter[str](), 0
    for path in paths:
        used.update(tag for tag, _ in path)
        answers += 1
    if not any(used[tag] for tag in table.names):  # none where tags are text that is not learned yet
        return
    for tag in table.names:
        writer.add_scalar(f"functional_tokens_{name}/{tag}", used[tag] / answers, step)
    places = torch.arange(len(table.names)).repeat_interleave(torch.tensor([used[tag] for tag in table.names]))
    bins = [i - 0.5 for i in range(len(table.names) + 1)]
    writer.add_histogram(f"functional_tokens/{name}", places, step, bins=bins)


def _writer(trainer: Trainer) -> SummaryWriter | None:
    """TensorBoard's writer on rank zero."""
    logger = next((logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)), None)
    return logger.experiment if logger and trainer.is_global_zero else None
