"""The SFT warm-up (arXiv 2502.13389, section 3.2): teach a model to write functional tokens, from annotated paths.

Shape suffixes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import lightning
import torch
from lightning.pytorch.strategies import FSDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint
from torchmetrics import Metric
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rftt_lightning.core.contracts import UserError
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.vocab import add_functional_tokens, load
from rftt_lightning.training.data import SFTBatch
from rftt_lightning.training.resume import ResumableModule

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda part: 1.0,
    "linear": lambda part: 1.0 - part,
    "cosine": lambda part: 0.5 * (1.0 + math.cos(math.pi * part)),
}
"""Shape of the learning rate over the part of training that is done, both in [0, 1]."""

CHUNK = 1024
"""Positions whose logits are in float32 at one time."""


@dataclass(frozen=True)
class SFTOutcome:
    """Sums over the loss tokens of a batch: negative log-likelihood in nats, tokens, right guesses (argmax), and the last two
    of functional tokens alone. Scalars."""

    nll: Tensor
    tokens: Tensor
    right: Tensor
    functional: Tensor
    functional_right: Tensor


class Ratio(Metric):
    """Sum of numerators over sum of denominators, over batches and ranks; nan if nothing was counted."""

    def __init__(self) -> None:
        super().__init__()
        self.add_state("above", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("below", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, above: Tensor, below: Tensor) -> None:
        self.above += above.detach()
        self.below += below.detach()

    def compute(self) -> Tensor:
        return (self.above / self.below).float()


class TokenMetrics(nn.Module):
    """Loss per token (nats), accuracy over response tokens, accuracy over functional tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.loss, self.token_accuracy, self.functional_accuracy = Ratio(), Ratio(), Ratio()

    def update(self, outcome: SFTOutcome) -> None:
        self.loss.update(outcome.nll, outcome.tokens)
        self.token_accuracy.update(outcome.right, outcome.tokens)
        self.functional_accuracy.update(outcome.functional_right, outcome.functional)

    def take(self, prefix: str) -> dict[str, Tensor]:
        """Values since the last call, of all ranks; those with nothing to count are left out."""
        values = {f"{prefix}/{name}": metric.compute() for name, metric in self.named_children()}
        for metric in self.children():
            metric.reset()
        return {name: value for name, value in values.items() if not value.isnan()}


class SFTModule(ResumableModule):
    """A causal LM that learns the response tokens of :class:`SFTBatch` es.

    Args:
        model: Hugging Face folder, ``pkg:`` path or hub name of the base model.
        tokens: functional-token table (YAML); None is the paper's.
        init: how new rows of the vocabulary start: description, random or mean (see ``add_functional_tokens``).
        lr: peak learning rate.
        betas: of AdamW.
        weight_decay: of AdamW, on matrices only (biases and norms have none).
        warmup_steps: optimizer steps over which the learning rate grows linearly.
        schedule: constant, linear or cosine after that.
        final_lr: what the schedule ends at, as a share of ``lr``.
        dtype: of the weights; training in "bfloat16" loses small updates, prefer trainer.precision bf16-mixed.
        attention: Transformers' attention implementation.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        seed: of the new rows' noise.
    """

    def __init__(
        self,
        model: str,
        tokens: str | None = None,
        init: str = "description",
        lr: float = 7e-6,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.1,
        warmup_steps: int = 10,
        schedule: str = "constant",
        final_lr: float = 0.0,
        dtype: str = "float32",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise UserError(f"model.schedule is {schedule!r}; use one of {', '.join(SCHEDULES)}")
        if not (
            lr > 0
            and warmup_steps >= 0
            and weight_decay >= 0
            and 0 <= final_lr <= 1
            and 0 <= min(betas) <= max(betas) < 1
        ):
            raise UserError(
                f"model out of range: lr {lr}, betas {betas}, warmup_steps {warmup_steps}, weight_decay {weight_decay}, final_lr "
                f"{final_lr}; need lr > 0, 0 <= betas < 1, warmup_steps >= 0, weight_decay >= 0, 0 <= final_lr <= 1"
            )
        self.save_hyperparameters()
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)
        self.model: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.learned, self.validated = TokenMetrics(), TokenMetrics()

    def setup(self, stage: str) -> None:
        if isinstance(self.trainer.strategy, FSDPStrategy):  # flattens weights: which of them decay could not be told
            raise UserError(
                "trainer.strategy fsdp is not supported; use ModelParallelStrategy as configs/strategy/fsdp2.yaml does"
            )
        if self.trainer.accumulate_grad_batches < 1:
            raise UserError(
                f"trainer.accumulate_grad_batches is {self.trainer.accumulate_grad_batches}; it must be at least 1"
            )
        limit = self.trainer.limit_train_batches  # 1 is one batch, 1.0 are all
        if self.trainer.accumulate_grad_batches > 1 and (isinstance(limit, int) or limit < 1.0):
            raise UserError(
                f"trainer.limit_train_batches {limit} may cut an optimizer step short, whose loss is over all its batches; leave "
                "it out, or set trainer.accumulate_grad_batches to 1"
            )
        if self.trainer.precision.startswith("16"):  # a gradient scaler's infinities would end the run
            raise UserError(f"trainer.precision is {self.trainer.precision}; use bf16-mixed, or 32-true")

    def configure_model(self) -> None:
        """Load the base model and add the functional tokens; shard the weights if the strategy brings a device mesh (FSDP2)."""
        if self.model is not None:
            return
        settings = self.hparams
        self.model, self.tokenizer = load(settings.model, settings.dtype, settings.attention)
        add_functional_tokens(self.model, self.tokenizer, self.table, settings.init, settings.seed)
        self.model.train()
        if settings.gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        if self.device_mesh is not None:
            shard(self.model, self.device_mesh)

    # -- loss ------------------------------------------------------------------------------------------------------------

    def compute(self, batch: SFTBatch) -> SFTOutcome:
        """Sums over a batch's loss tokens. Pure: logs nothing, and reads nothing but the batch and the weights."""
        logits_BTV = self.model(
            input_ids=batch.tokens_BT, position_ids=batch.positions_BT, attention_mask=None, use_cache=False
        ).logits
        loss_BT = batch.loss_BT[:, 1:]
        targets, functional = batch.tokens_BT[:, 1:][loss_BT], batch.functional_BT[:, 1:][loss_BT]
        nll, right = nll_and_right(logits_BTV[:, :-1][loss_BT], targets)
        return SFTOutcome(
            nll.sum() + 0.0 * logits_BTV[0, 0, 0].float(),  # a batch without loss tokens must have gradients, too
            loss_BT.sum(),
            right.sum(),
            functional.sum(),
            (right & functional).sum(),
        )

    def training_step(self, batch: SFTBatch, batch_idx: int) -> Tensor:
        outcome = self.compute(batch)
        self.learned.update(outcome)
        # The trainer averages over ranks and accumulated batches; the sum over them is to be divided by all their tokens.
        loss = outcome.nll * self.trainer.world_size * self.trainer.accumulate_grad_batches / batch.denominator
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"loss is {loss.item()} at step {self.global_step}; lower model.lr or check the base model"
            )
        return loss

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.parameters() if p.grad is not None])
        norm = norm.full_tensor() if isinstance(norm, DTensor) else norm
        if not torch.isfinite(norm):
            raise FloatingPointError(f"gradient norm is {norm.item()} at step {self.global_step}; lower model.lr")
        values = self.learned.take("train")
        self.log("train/loss", values.pop("train/loss"), prog_bar=True)
        self.log_dict({**values, "train/grad_norm": norm, "train/lr": optimizer.param_groups[0]["lr"]})

    def validation_step(self, batch: SFTBatch, batch_idx: int) -> None:
        self.validated.update(self.compute(batch))

    def on_validation_epoch_end(self) -> None:
        values = self.validated.take("val")
        self.log("val/loss", values.pop("val/loss"), prog_bar=True, sync_dist=True)
        self.log_dict(values, sync_dist=True)

    # -- optimizer -------------------------------------------------------------------------------------------------------

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return scheduled_adamw(self, tuple(self.hparams.betas))


def nll_and_right(logits_NV: Tensor, targets_N: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood in nats (float32) and whether the target is the argmax, of N positions. In chunks, each computed
    anew in the backward pass: log-probabilities in float32 are kept of none."""
    pairs = [
        (checkpoint(_nll, logits, targets, use_reentrant=False), logits.argmax(-1) == targets)
        for logits, targets in zip(logits_NV.split(CHUNK), targets_N.split(CHUNK), strict=True)
    ]
    return torch.cat([nll for nll, _ in pairs]), torch.cat([right for _, right in pairs])


def _nll(logits_NV: Tensor, targets_N: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits_NV.float(), targets_N, reduction="none")


def lr_factor(step: int, total: float, settings: Any) -> float:
    """Learning rate of a step (from 0) as a share of the peak: linear warm-up, then the schedule down to ``final_lr``."""
    warm = settings.warmup_steps
    if step < warm:
        return (step + 1) / warm
    part = min(1.0, (step - warm) / max(1.0, total - warm))
    return settings.final_lr + (1.0 - settings.final_lr) * SCHEDULES[settings.schedule](part)


def shard(model: PreTrainedModel, mesh: DeviceMesh) -> None:
    """FSDP2: each decoder layer is a unit, the rest another. ``mesh`` is that of Lightning's ModelParallelStrategy."""
    if mesh["tensor_parallel"].size() != 1:
        raise UserError(
            "tensor_parallel_size must be 1: set it, and data_parallel_size to the number of devices, in trainer.strategy"
        )
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, mesh=mesh["data_parallel"])
    fully_shard(model, mesh=mesh["data_parallel"])


def scheduled_adamw(module: lightning.LightningModule, betas: tuple[float, float]) -> OptimizerLRScheduler:
    """AdamW on what is trained of a module, weight decay on matrices only, with the schedule of its settings."""
    settings = module.hparams
    parameters = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    optimizer = AdamW(groups, lr=settings.lr, betas=betas)
    total = module.trainer.estimated_stepping_batches
    factor = LambdaLR(optimizer, lambda step: lr_factor(step, total, settings))
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": factor, "interval": "step"}}
