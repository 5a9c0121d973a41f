"""What RL learns: rollouts as a batch, and the module that turns it into a loss. It never generates.

Shape suffixes: B rows, T response positions (right-padded), L prompt and response, V vocabulary.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import lightning
import torch
from torch import Tensor, nn
from torch.func import functional_call

from rftt_lightning.core.contracts import Provenance, Rollout, UserError
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy import logprobs, objectives
from rftt_lightning.policy.adapters import LoRA, adapt, without_dropout
from rftt_lightning.policy.hf import digest
from rftt_lightning.policy.vocab import Vocabulary, add_functional_tokens, end_ids, load


@dataclass(frozen=True)
class RLBatch:
    """Scored rollouts as tensors, one a row; position t predicts token t + 1 of ``tokens_BL``.

    ``mask_BT`` is 1.0 on response tokens; ``states_BT`` their grammar states; ``provenance_BT`` who chose them;
    ``behaviour_BT`` the sampler's log-probs; ``node_BT`` the number of the segment's node, -1 outside the response, the same where
    rollouts share the segment; ``rewards_BT`` the segment rewards, each on the last token of its segment; ``group_B`` numbers the
    problems. ``old_BT``, ``reference_BT`` (log-probs before the update) and ``advantage_BT`` come from
    :meth:`RLModule.prepare`.
    """

    tokens_BL: Tensor
    mask_BT: Tensor
    states_BT: Tensor
    provenance_BT: Tensor
    behaviour_BT: Tensor
    node_BT: Tensor
    rewards_BT: Tensor
    group_B: Tensor
    old_BT: Tensor
    reference_BT: Tensor
    advantage_BT: Tensor

    def __len__(self) -> int:
        return len(self.tokens_BL)

    def columns(self) -> tuple[Tensor, ...]:
        return tuple(getattr(self, f.name) for f in fields(self))

    def rows(self, index: Tensor) -> RLBatch:
        return RLBatch(*(column[index] for column in self.columns()))

    def to(self, device: torch.device) -> RLBatch:
        return RLBatch(*(column.to(device) for column in self.columns()))

    def muted(self) -> RLBatch:
        """The same rows with nothing to learn in them: no response token, no reward."""
        return replace(self, mask_BT=torch.zeros_like(self.mask_BT), rewards_BT=torch.zeros_like(self.rewards_BT))

    def split(self, rows: int) -> Iterator[tuple[Tensor, RLBatch]]:
        """Micro-batches of at most ``rows`` rows of like length, each with the numbers of its rows, and without the columns that
        are padding in all of them."""
        length_B, width = objectives.last_positions(self.mask_BT) + 1, self.mask_BT.shape[1]
        for index in length_B.argsort(stable=True).split(rows):
            spare = width - int(length_B[index].max())
            part = self.rows(index)
            yield index, RLBatch(*(c[:, : c.shape[1] - spare] if c.ndim == 2 else c for c in part.columns()))


def collate(rollouts: Sequence[Rollout], vocabulary: Vocabulary) -> RLBatch:
    """A batch of scored rollouts, those of a problem from one tree. The ids are those that were sampled; nothing is encoded
    again."""
    groups = {name: i for i, name in enumerate(dict.fromkeys(r.problem.id for r in rollouts))}
    width = max(len(r.prompt) + r.length for r in rollouts)
    tokens = torch.zeros(len(rollouts), width, dtype=torch.long)
    mask, behaviour, rewards = (torch.zeros(len(rollouts), width - 1) for _ in range(3))
    states = torch.zeros(len(rollouts), width - 1, dtype=torch.long)
    provenance = torch.full((len(rollouts), width - 1), int(Provenance.PROMPT))
    node, numbers = torch.full((len(rollouts), width - 1), -1), defaultdict[tuple[Any, int], int](lambda: len(numbers))
    for row, rollout in enumerate(rollouts):
        response = [token for segment in rollout.segments for token in segment.tokens]
        tokens[row, : len(rollout.prompt) + len(response)] = torch.tensor([*rollout.prompt, *response])
        span = slice(len(rollout.prompt) - 1, len(rollout.prompt) - 1 + len(response))
        mask[row, span] = 1.0
        states[row, span] = vocabulary.states(torch.tensor([response], dtype=torch.long))[0]
        provenance[row, span] = torch.tensor([p for segment in rollout.segments for p in segment.provenance])
        behaviour[row, span] = torch.tensor([x for segment in rollout.segments for x in segment.logprobs])
        # outside a tree every segment is a node of its own
        names = [(rollout.problem.id, k) for k in rollout.nodes] or [(row, k) for k in range(len(rollout.segments))]
        end = span.start - 1
        for segment, name, reward in zip(rollout.segments, names, rollout.score.rewards, strict=True):  # type: ignore[union-attr]
            node[row, end + 1 : end + 1 + len(segment.tokens)] = numbers[name]
            end += len(segment.tokens)
            rewards[row, end] += reward  # a segment without tokens shares the position of the one before it
    group = torch.tensor([groups[r.problem.id] for r in rollouts])
    empty = torch.zeros_like(mask)
    return RLBatch(tokens, mask, states, provenance, behaviour, node, rewards, group, empty, empty, empty)


class Work:
    """A micro-batch and the ``totals`` of its step, as :meth:`RLModule.forward` takes them. A class that Fabric does not know: in
    mixed precision it rounds whatever tensor it finds in the arguments to bfloat16, and a log-probability of -8 is then off by
    0.03, a count of 1,001 tokens by 1."""

    def __init__(self, totals: Tensor, batch: RLBatch) -> None:
        self.totals, self.batch = totals, batch


MEASURED = ("loss", "clip_fraction", "entropy", "approx_kl")
"""What :meth:`RLModule.forward` measures besides the loss it returns."""

CHOICES = {
    "advantage": objectives.ADVANTAGES,
    "kl": ("k1", "k2", "k3"),
    "kl_in": ("reward", "loss"),
    "gamma_per": ("token", "segment"),
    "aggregation": ("token", "sequence", "constant"),
    "importance": ("none", "truncated", "masked"),
}
"""Named options of :class:`RLModule`."""


class _Scorer(nn.Module):
    """:meth:`RLModule.log_probs` as a module, which ``functional_call`` can lend other weights."""

    def __init__(self, model: nn.Module, allowed_SV: Tensor, temperature: float) -> None:
        super().__init__()
        self.model, self.allowed_SV, self.temperature = model, allowed_SV, temperature

    def forward(self, batch: RLBatch) -> tuple[Tensor, Tensor]:
        where_BT = batch.mask_BT > 0
        backbone, head = logprobs.parts(self.model)
        hidden_BTH = backbone(input_ids=batch.tokens_BL, use_cache=False).last_hidden_state[:, :-1]
        columns = (x_BT[where_BT] for x_BT in (hidden_BTH, batch.tokens_BL[:, 1:], batch.states_BT))
        found = logprobs.written(head, *columns, self.allowed_SV, self.temperature)
        logp_BT, entropy_BT = (torch.zeros_like(batch.mask_BT).masked_scatter(where_BT, x_N) for x_N in found)
        return logp_BT, entropy_BT


class RLModule(lightning.LightningModule):
    """REINFORCE++ (arXiv 2501.03262) and its relatives on rollouts of functional-token-guided search.

    The recipes of the papers: REINFORCE++ with its group mean has ``kl: k2, kl_in: loss``; GRPO ``kl: k3, kl_in: loss, aggregation:
    sequence``; Dr. GRPO ``aggregation: constant``.

    Args:
        model: Hugging Face folder, ``pkg:`` path or hub name of the SFT model; functional tokens that it lacks are added.
        tokens: functional-token table; None is the paper's.
        init: how added rows start, see ``add_functional_tokens``.
        advantage: one of the names of ``objectives.advantages``.
        kl, kl_in, kl_beta: the estimate of KL(policy || reference), k1, k2 or k3; whether it is a penalty in the token rewards
            (``reward``, of all response tokens) or a ``loss`` beside the policy's, weighted as that; its weight, at least 0.
            Which of the six have a divergence's gradient says ``objectives.kl_penalty``: k1 in the reward has that of the
            sequence, k2 in the loss that of each token, k1 in the loss none.
        gamma, gamma_per: discount, in 0..1, per ``token`` or per ``segment``.
        clip_low, clip_high: how far the probability ratio may fall below and rise above 1, at least 0.
        aggregation: of tokens to the loss, see ``objectives.aggregate``; constant_length: its divisor for ``constant``, at least 1.
        importance: weighs sampled tokens by the trainer's probability over the sampler's: ``truncated`` at importance_cap,
            ``masked`` outside 1 / importance_cap .. importance_cap, or ``none``; the cap is at least 1.
        temperature: of the log-probs, above 0; must be that of the sampling.
        forced_weight: weight in the loss of functional tokens that search forced (1 keeps, 0 masks them).
        argmax_weight: the same for those that are the policy's favourites; None is forced_weight.
        lr, betas, weight_decay: of AdamW; warmup_steps, final_lr: linear warm-up, then cosine down to this share.
        trainable: ``all`` weights; ``functional_rows``: the functional tokens' rows of the embeddings alone; ``lora``: low-rank
            updates of the linear layers, and these rows. The reference shares what is not trained with the policy.
        lora: rank, alpha and targets, for ``trainable: lora``.
        reference_reset: every so many steps the policy becomes the reference (arXiv 2505.24864; the optimizer keeps
            its state here); None: it stays the model that training began with.
        dtype: of the weights; training in "bfloat16" loses small updates, prefer trainer.precision bf16-mixed. What LoRA and
            functional_rows train is in float32 whatever the frozen rest is in.
        attention: Transformers' attention implementation.
        gradient_checkpointing: recompute activations in the backward pass, to save memory.
        seed: of the noise in added rows, and of LoRA's beginning; null: seed_everything, or 0.

    Raises :class:`UserError` for values out of these ranges.
    """

    def __init__(
        self,
        model: str,
        tokens: str | None = None,
        init: str = "description",
        advantage: str = "reinforce++",
        kl: str = "k1",
        kl_in: str = "reward",
        kl_beta: float = 0.01,
        gamma: float = 1.0,
        gamma_per: str = "token",
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        aggregation: str = "token",
        constant_length: int = 1024,
        importance: str = "none",
        importance_cap: float = 2.0,
        temperature: float = 1.0,
        forced_weight: float = 1.0,
        argmax_weight: float | None = None,
        lr: float = 5e-7,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        warmup_steps: int = 3,
        final_lr: float = 0.1,
        trainable: str = "all",
        lora: LoRA = LoRA(),  # noqa: B008  frozen
        reference_reset: int | None = None,
        dtype: str = "float32",
        attention: str = "sdpa",
        gradient_checkpointing: bool = False,
        seed: int | None = None,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        for name, known in CHOICES.items():
            if self.hparams[name] not in known:
                raise UserError(f"model.{name} is {self.hparams[name]!r}; use {', '.join(known[:-1])} or {known[-1]}")
        needs = {
            "lr": (lr > 0, "above 0"),
            "temperature": (temperature > 0, "above 0, that of the sampling"),
            "gamma": (0 <= gamma <= 1, "in 0..1"),
            "final_lr": (0 <= final_lr <= 1, "in 0..1, a share of lr"),
            "betas": (all(0 <= beta < 1 for beta in betas), "two numbers from 0 to below 1"),
            "constant_length": (constant_length >= 1, "at least 1"),
            "importance_cap": (importance_cap >= 1, "at least 1"),
            "reference_reset": (reference_reset is None or reference_reset >= 1, "null or at least 1"),
            "argmax_weight": (argmax_weight is None or argmax_weight >= 0, "null or at least 0"),
        }
        for name in ("kl_beta", "clip_low", "clip_high", "forced_weight", "weight_decay", "warmup_steps"):
            needs[name] = (self.hparams[name] >= 0, "at least 0")
        for name, (holds, need) in needs.items():
            if not holds:
                raise UserError(f"model.{name} is {self.hparams[name]}; it must be {need}")
        if (kl, kl_in) == ("k1", "loss") and kl_beta:
            warnings.warn(
                "model.kl k1 in the loss has an expected gradient of 0; use k2, or kl_in reward", stacklevel=2
            )
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)
        self.model, self.tokenizer = load(model, dtype, attention)
        without_dropout(self.model)
        add_functional_tokens(self.model, self.tokenizer, self.table, init, seed or 0)
        logprobs.check_parts(self.model)
        width = self.model.get_output_embeddings().weight.shape[0]
        ends = end_ids(self.tokenizer, self.model.generation_config)
        self.vocabulary = Vocabulary(self.tokenizer, self.table, width, ends)
        self.register_buffer("allowed_SV", self.vocabulary.allowed_SV, persistent=False)
        if trainable == "functional_rows" and self.table.as_text:
            raise UserError("model.trainable is functional_rows, but tags that are text have none; use all or lora")
        rows = [*self.vocabulary.opens, *self.vocabulary.closes]
        self._adapted = [
            adapt(self.model, rows, trainable, lora, seed or 0)
        ]  # in a list: not a module beside the model
        if gradient_checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.reset_reference()

    # -- weights ---------------------------------------------------------------------------------------------------------

    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters that learn, by their names in ``model``."""
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def reset_reference(self) -> None:
        """The policy of now becomes the reference: ``reference`` holds a copy of what is trained, the rest is shared."""
        self.reference = {name: parameter.detach().clone() for name, parameter in self.trained().items()}

    def weights_saved(self) -> dict[str, Tensor]:
        """What a checkpoint holds of the model: all of its state, without what is frozen."""
        state = self.model.state_dict(keep_vars=True)
        whole = self.hparams.trainable == "all"
        return {name: tensor.detach() for name, tensor in state.items() if whole or tensor.requires_grad}

    def load_weights(self, saved: Mapping[str, Tensor]) -> None:
        """Take back :meth:`weights_saved`. Raises :class:`UserError` where they are of another model."""
        try:
            if saved.keys() != self.weights_saved().keys():
                raise RuntimeError("other names")
            self.model.load_state_dict(saved, strict=False)
        except RuntimeError as error:
            raise UserError(
                "the checkpoint does not fit the model: other sizes, another vocabulary, or other weights are trained; give the "
                "model.model, model.trainable and model.lora that its run began with"
            ) from error

    def digest(self) -> str:
        """Of every bit of what is trained: one policy of a run from another."""
        return digest(self.trained().values())

    def merged(self) -> Any:
        """The Hugging Face model with what was trained in its plain weights. It is for export: nothing is trained after it. Where
        only some of it was trained all is in float32 then: bfloat16 would round most of a low-rank update away."""
        (adapted,) = self._adapted
        return self.model if adapted is None else adapted.float().merge_and_unload()

    # -- from rollouts to a loss -----------------------------------------------------------------------------------------

    def log_probs(self, batch: RLBatch, weights: Mapping[str, Tensor] | None = None) -> tuple[Tensor, Tensor]:
        """Log-probabilities [B, T] of the response tokens under the grammar mask, the distribution that was sampled from, and its
        entropy; 0 elsewhere. ``weights`` stand in for those of the policy, as ``reference`` does. Only response tokens have
        logits, some at a time."""
        scorer = _Scorer(self.model, self.allowed_SV, self.hparams.temperature)
        if weights is None:
            return scorer(batch)
        lent = {f"model.{name}": weight for name, weight in weights.items()}
        # peft's rows of tied embeddings are one entry of one dictionary: swapped by both names, it would not be put back
        return functional_call(scorer, lent, (batch,), tie_weights=self.hparams.trainable == "all")

    @torch.no_grad()
    def prepare(self, batch: RLBatch, rows: int, reduce: objectives.Reduce = lambda x: x) -> RLBatch:
        """Fill in old and reference log-probs, ``rows`` rows at a time, and the advantages over the global batch."""
        self.model.eval()
        old_BT, reference_BT = torch.zeros_like(batch.mask_BT), torch.zeros_like(batch.mask_BT)
        for index, part in batch.split(rows):
            span = slice(part.mask_BT.shape[1])
            old_BT[index, span], _ = self.log_probs(part)
            reference_BT[index, span], _ = self.log_probs(part, self.reference)
        batch = replace(batch, old_BT=old_BT, reference_BT=reference_BT)
        return replace(batch, advantage_BT=self.advantages(batch, reduce))

    def advantages(self, batch: RLBatch, reduce: objectives.Reduce = lambda x: x) -> Tensor:
        """Advantages [B, T] by their name, 0 outside the response."""
        settings, penalty_BT = self.hparams, torch.zeros_like(batch.mask_BT)
        if settings.kl_in == "reward":
            penalty_BT = settings.kl_beta * objectives.kl_penalty(batch.old_BT, batch.reference_BT, settings.kl)
        columns = batch.rewards_BT, penalty_BT, batch.mask_BT, batch.node_BT, batch.group_B
        return objectives.advantages(settings.advantage, *columns, settings.gamma, settings.gamma_per, reduce)

    def totals(self, batch: RLBatch) -> Tensor:
        """What the loss is divided by, and the number of response tokens [2], before the sum over ranks."""
        return torch.stack([self.weights(batch)[1], batch.mask_BT.sum()])

    def weights(self, batch: RLBatch) -> tuple[Tensor, Tensor]:
        """Share [B, T] of each token in the loss, and the divisor of their sum: ``aggregation`` over response tokens, of which
        those weigh ``forced_weight`` or ``argmax_weight`` that the policy did not sample."""
        settings = self.hparams
        weight_BT = torch.where(batch.provenance_BT == int(Provenance.UCT), settings.forced_weight, 1.0)
        argmax = settings.forced_weight if settings.argmax_weight is None else settings.argmax_weight
        weight_BT = weight_BT.masked_fill(batch.provenance_BT == int(Provenance.ARGMAX), argmax)
        return objectives.aggregate(weight_BT * batch.mask_BT, settings.aggregation, settings.constant_length)

    def forward(self, work: Work) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch, and its detached share of :data:`MEASURED`. The totals are those of the whole optimizer step, over
        all ranks: the first divides loss and clip fraction, the second the rest."""
        (divisor, count), batch, settings = work.totals, work.batch, self.hparams
        logp_BT, entropy_BT = self.log_probs(batch)
        weight_BT, _ = self.weights(batch)
        sampled_BT = batch.provenance_BT == int(Provenance.SAMPLED)
        trust_BT = objectives.importance(batch.old_BT, batch.behaviour_BT, settings.importance, settings.importance_cap)
        weight_BT = torch.where(sampled_BT, weight_BT * trust_BT, weight_BT)
        clip = settings.clip_low, settings.clip_high
        loss, clipped = objectives.ppo_loss(logp_BT, batch.old_BT, batch.advantage_BT, weight_BT, divisor, *clip)
        if settings.kl_in == "loss":
            kl = objectives.kl_loss(logp_BT, batch.reference_BT, weight_BT, divisor, settings.kl)
            loss = loss + settings.kl_beta * kl
        moved_BT = objectives.kl_penalty(batch.old_BT, logp_BT.detach(), "k3") * batch.mask_BT
        return loss, torch.stack([loss.detach(), clipped.detach(), entropy_BT.sum() / count, moved_BT.sum() / count])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        settings = self.hparams
        betas, decay = tuple(settings.betas), settings.weight_decay
        return torch.optim.AdamW(self.trained().values(), settings.lr, betas, weight_decay=decay)

    def learning_rate(self, step: int, steps: int) -> float:
        """Linear warm-up, then cosine from ``lr`` to ``final_lr * lr`` over ``steps``."""
        settings = self.hparams
        if step < settings.warmup_steps:
            return settings.lr * (step + 1) / settings.warmup_steps
        part = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
        return settings.lr * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * part)))
