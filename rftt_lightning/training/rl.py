"""What RL learns: rollouts as a batch, and the module that turns it into a loss. It never generates.

Shape suffixes: B rows, T response positions (right-padded), L prompt and response, V vocabulary.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace

import lightning
import torch
from torch import Tensor

from rftt_lightning.core.contracts import Provenance, Rollout, UserError
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy import objectives
from rftt_lightning.policy.vocab import Vocabulary, add_functional_tokens, load, masked_log_softmax


@dataclass(frozen=True)
class RLBatch:
    """Scored rollouts as tensors, one a row; position t predicts token t + 1 of ``tokens_BL``.

    ``mask_BT`` is 1.0 on response tokens; ``states_BT`` their grammar states; ``provenance_BT`` who chose them;
    ``behaviour_BT`` the sampler's log-probs; ``rewards_BT`` the segment rewards, each on the last token of its segment;
    ``group_B`` numbers the problems. ``old_BT``, ``reference_BT`` (log-probs before the update) and ``advantage_BT`` come from
    :meth:`RLModule.prepare`.
    """

    tokens_BL: Tensor
    mask_BT: Tensor
    states_BT: Tensor
    provenance_BT: Tensor
    behaviour_BT: Tensor
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
        length_B, width = last_positions(self.mask_BT) + 1, self.mask_BT.shape[1]
        for index in length_B.argsort(stable=True).split(rows):
            spare = width - int(length_B[index].max())
            part = self.rows(index)
            yield index, RLBatch(*(c[:, : c.shape[1] - spare] if c.ndim == 2 else c for c in part.columns()))


def collate(rollouts: Sequence[Rollout], vocabulary: Vocabulary) -> RLBatch:
    """A batch of scored rollouts. The ids are those that were sampled; nothing is encoded again."""
    groups = {name: i for i, name in enumerate(dict.fromkeys(r.problem.id for r in rollouts))}
    width = max(len(r.prompt) + r.length for r in rollouts)
    tokens = torch.zeros(len(rollouts), width, dtype=torch.long)
    mask, behaviour, rewards = (torch.zeros(len(rollouts), width - 1) for _ in range(3))
    states, provenance = (torch.zeros(len(rollouts), width - 1, dtype=torch.long) for _ in range(2))
    for row, rollout in enumerate(rollouts):
        response = [token for segment in rollout.segments for token in segment.tokens]
        tokens[row, : len(rollout.prompt) + len(response)] = torch.tensor([*rollout.prompt, *response])
        span = slice(len(rollout.prompt) - 1, len(rollout.prompt) - 1 + len(response))
        mask[row, span] = 1.0
        states[row, span] = vocabulary.states(torch.tensor([response]))[0]
        provenance[row, span] = torch.tensor([p for segment in rollout.segments for p in segment.provenance])
        behaviour[row, span] = torch.tensor([x for segment in rollout.segments for x in segment.logprobs])
        end = span.start - 1
        for segment, reward in zip(rollout.segments, rollout.score.rewards, strict=True):  # type: ignore[union-attr]
            end += len(segment.tokens)
            rewards[row, end] += reward  # a segment without tokens shares the position of the one before it
    group = torch.tensor([groups[r.problem.id] for r in rollouts])
    empty = torch.zeros_like(mask)
    return RLBatch(tokens, mask, states, provenance, behaviour, rewards, group, empty, empty, empty)


MEASURED = ("loss", "clip_fraction", "entropy", "approx_kl")
"""What :meth:`RLModule.forward` measures besides the loss it returns."""


class RLModule(lightning.LightningModule):
    """REINFORCE++ (arXiv 2501.03262) on rollouts of functional-token-guided search.

    ``reinforce++`` is that paper's: per token the reward minus ``kl_beta`` times k1, summed to the return-to-go (eq. 6) and
    whitened over the global batch (eq. 8). ``reinforce++-baseline`` takes the problem's mean reward off the last token first and
    then only scales. It departs from the paper in its KL: there the baseline has a separate k2 loss beside the policy's, here the
    k1 penalty stays in the token rewards (and is not part of the mean), so that one ``kl_beta`` means the same in both.

    Args:
        model: Hugging Face folder, ``pkg:`` path or hub name of the SFT model; functional tokens that it lacks are added.
        tokens: functional-token table; None is the paper's.
        init: how added rows start, see ``add_functional_tokens``.
        advantage: ``reinforce++`` or ``reinforce++-baseline``.
        kl_beta: weight of the k1 penalty in the token rewards, at least 0.
        gamma: discount per token, in 0..1.
        clip_low, clip_high: how far the probability ratio may fall below and rise above 1, at least 0.
        temperature: of the log-probs, above 0; must be that of the sampling.
        forced_weight: weight in the loss of functional tokens that search forced (1 keeps, 0 masks them).
        lr, betas, weight_decay: of AdamW; warmup_steps, final_lr: linear warm-up, then cosine down to this share.
        dtype: of the weights; training in "bfloat16" loses small updates, prefer trainer.precision bf16-mixed.
        attention: Transformers' attention implementation.
        seed: of the noise in added rows.

    Raises :class:`UserError` for values out of these ranges.
    """

    def __init__(
        self,
        model: str,
        tokens: str | None = None,
        init: str = "description",
        advantage: str = "reinforce++",
        kl_beta: float = 0.01,
        gamma: float = 1.0,
        clip_low: float = 0.2,
        clip_high: float = 0.2,
        temperature: float = 1.0,
        forced_weight: float = 1.0,
        lr: float = 5e-7,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.0,
        warmup_steps: int = 3,
        final_lr: float = 0.1,
        dtype: str = "float32",
        attention: str = "sdpa",
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        if advantage not in ("reinforce++", "reinforce++-baseline"):
            raise UserError(f"model.advantage is {advantage!r}; use reinforce++ or reinforce++-baseline")
        needs = {
            "lr": (lr > 0, "above 0"),
            "temperature": (temperature > 0, "above 0, that of the sampling"),
            "gamma": (0 <= gamma <= 1, "in 0..1"),
            "final_lr": (0 <= final_lr <= 1, "in 0..1, a share of lr"),
            "betas": (all(0 <= beta < 1 for beta in betas), "two numbers from 0 to below 1"),
        }
        for name in ("kl_beta", "clip_low", "clip_high", "forced_weight", "weight_decay", "warmup_steps"):
            needs[name] = (self.hparams[name] >= 0, "at least 0")
        for name, (holds, need) in needs.items():
            if not holds:
                raise UserError(f"model.{name} is {self.hparams[name]}; it must be {need}")
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)
        self.model, self.tokenizer = load(model, dtype, attention)
        add_functional_tokens(self.model, self.tokenizer, self.table, init, seed)
        width = self.model.get_output_embeddings().weight.shape[0]
        self.vocabulary = Vocabulary(self.tokenizer, self.table, width)
        self.register_buffer("allowed_SV", self.vocabulary.allowed_SV, persistent=False)
        self._reference = [copy.deepcopy(self.model).requires_grad_(False).eval()]  # in a list: not a part of the state

    @property
    def reference(self) -> torch.nn.Module:
        return self._reference[0]

    def log_probs(self, model: torch.nn.Module, batch: RLBatch) -> Tensor:
        """Log-probabilities [B, T, V] under the grammar mask, the distribution that was sampled from."""
        logits_BTV = model(input_ids=batch.tokens_BL, use_cache=False).logits[:, :-1]
        return masked_log_softmax(logits_BTV, batch.states_BT, self.allowed_SV, self.hparams.temperature)

    @torch.no_grad()
    def prepare(self, batch: RLBatch, rows: int, reduce: objectives.Reduce = lambda x: x) -> RLBatch:
        """Fill in old and reference log-probs, ``rows`` rows at a time, and the advantages over the global batch."""
        old_BT, reference_BT = torch.zeros_like(batch.mask_BT), torch.zeros_like(batch.mask_BT)
        for index, part in batch.split(rows):
            span = slice(part.mask_BT.shape[1])
            old_BT[index, span], reference_BT[index, span] = self._old_and_reference(part)
        kl_BT = objectives.kl_penalty(old_BT, reference_BT) * batch.mask_BT
        rewards_BT, baseline = batch.rewards_BT, self.hparams.advantage == "reinforce++-baseline"
        if baseline:  # the mean total reward of the problem's rollouts is taken off the last response token
            total_B = rewards_BT.sum(1)
            offset_B = objectives.subtract_group_mean(total_B, batch.group_B) - total_B
            rewards_BT = rewards_BT.scatter_add(1, last_positions(batch.mask_BT)[:, None], offset_B[:, None])
        returns_BT = objectives.returns_to_go(rewards_BT - self.hparams.kl_beta * kl_BT, self.hparams.gamma)
        advantage_BT = objectives.whiten(returns_BT, batch.mask_BT, reduce, center=not baseline)
        return replace(batch, old_BT=old_BT, reference_BT=reference_BT, advantage_BT=advantage_BT)

    def _old_and_reference(self, batch: RLBatch) -> tuple[Tensor, Tensor]:
        self.model.eval()
        targets_BT, masked = batch.tokens_BL[:, 1:], batch.mask_BT == 0
        both = (objectives.take(self.log_probs(m, batch), targets_BT) for m in (self.model, self.reference))
        old_BT, reference_BT = (x.masked_fill(masked, 0.0) for x in both)
        return old_BT, reference_BT

    def totals(self, batch: RLBatch) -> Tensor:
        """Weight and number [2] of the response tokens: what :meth:`forward` divides by, before the sum over ranks."""
        return torch.stack([self.weights(batch).sum(), batch.mask_BT.sum()])

    def weights(self, batch: RLBatch) -> Tensor:
        """Weight [B, T] of each token in the loss: 0 outside the response, ``forced_weight`` where search chose."""
        forced_BT = batch.provenance_BT != int(Provenance.SAMPLED)
        return torch.where(forced_BT, self.hparams.forced_weight, 1.0) * batch.mask_BT

    def forward(self, weight: Tensor, count: Tensor, *columns: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of a micro-batch, and its detached share of :data:`MEASURED`. Of the whole optimizer step, over all ranks,
        ``weight`` is the weight of all tokens, which divides loss and clip fraction, and ``count`` the number of response tokens,
        which divides the rest. ``columns`` are the fields of an :class:`RLBatch` (Fabric's wrapper takes tensors, not frozen
        records)."""
        batch = RLBatch(*columns)
        logp_BTV = self.log_probs(self.model, batch)
        logp_BT = objectives.take(logp_BTV, batch.tokens_BL[:, 1:]).masked_fill(batch.mask_BT == 0, 0.0)
        clip = self.hparams.clip_low, self.hparams.clip_high
        loss, clipped = objectives.ppo_loss(
            logp_BT, batch.old_BT, batch.advantage_BT, self.weights(batch), weight, *clip
        )
        entropy = (objectives.entropy(logp_BTV.detach()) * batch.mask_BT).sum() / count
        moved = (objectives.kl_penalty(batch.old_BT, logp_BT.detach(), "k3") * batch.mask_BT).sum() / count
        return loss, torch.stack([loss.detach(), clipped.detach(), entropy, moved])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        settings = self.hparams
        parameters = self.model.parameters()
        return torch.optim.AdamW(parameters, settings.lr, tuple(settings.betas), weight_decay=settings.weight_decay)

    def learning_rate(self, step: int, steps: int) -> float:
        """Linear warm-up, then cosine from ``lr`` to ``final_lr * lr`` over ``steps``."""
        settings = self.hparams
        if step < settings.warmup_steps:
            return settings.lr * (step + 1) / settings.warmup_steps
        part = (step - settings.warmup_steps) / max(1, steps - settings.warmup_steps)
        return settings.lr * (settings.final_lr + (1 - settings.final_lr) * 0.5 * (1 + math.cos(math.pi * part)))


def last_positions(mask_BT: Tensor) -> Tensor:
    """Index [B] of each row's last response position."""
    return mask_BT.shape[1] - 1 - mask_BT.flip(1).argmax(1)
