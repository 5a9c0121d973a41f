"""Log-probabilities of written tokens, without the logits of all of them at a time.

Shape suffixes: N tokens, H width of the hidden states, V vocabulary, S grammar states.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rftt_lightning.core.contracts import UserError
from rftt_lightning.policy import objectives
from rftt_lightning.policy.vocab import masked_log_softmax

Head = Callable[[Tensor], Tensor]
"""Logits [..., V] of hidden states [..., H]."""

AT_ONCE = 1 << 26
"""Logits in memory at a time: 256 MiB in float32, held a few times over (scores, mask, log-probabilities, gradient)."""


def parts(model: Any) -> tuple[nn.Module, Head]:
    """Backbone and head of a causal language model, bare or in a peft wrapper: ``head(backbone(ids).last_hidden_state)`` are
    its logits. Both are called as modules, so that hooks and adapters act."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    linear, cap = causal.get_output_embeddings(), getattr(causal.config, "final_logit_softcapping", None) or math.inf

    def capped(hidden: Tensor) -> Tensor:
        return cap * torch.tanh(linear(hidden) / cap)

    return causal.base_model, capped if cap < math.inf else linear


@torch.no_grad()
def check_parts(model: Any) -> None:
    """Raises :class:`UserError` unless :func:`parts` together give the model's own logits, tried on a few tokens: a model may
    scale them in a way that its class alone knows."""
    backbone, head = parts(model)
    tokens = torch.arange(4, device=next(model.parameters()).device)[None]
    whole = model(input_ids=tokens, use_cache=False).logits
    hidden = getattr(backbone(input_ids=tokens, use_cache=False), "last_hidden_state", None)
    if hidden is None or (head(hidden) - whole).abs().max() > 1e-3 * whole.abs().max():
        raise UserError(
            f"{type(model).__name__} does more to its logits than output embedding and soft cap, so log-probabilities cannot be "
            "taken some tokens at a time; use another architecture"
        )


def written(
    head: Head,
    hidden_NH: Tensor,
    tokens_N: Tensor,
    states_N: Tensor,
    allowed_SV: Tensor,
    temperature: float = 1.0,
    at_once: int = AT_ONCE,
) -> tuple[Tensor, Tensor]:
    """Log-probability [N] of each token that was written, and the entropy [N] of the distribution that it was taken from, which
    is that of :func:`masked_log_softmax`. No more than ``at_once`` logits exist at a time: the backward pass computes them
    again. The entropy carries no gradient."""

    def some(hidden_NH: Tensor, tokens_N: Tensor, states_N: Tensor) -> tuple[Tensor, Tensor]:
        logp_NV = masked_log_softmax(head(hidden_NH), states_N, allowed_SV, temperature)
        return objectives.take(logp_NV, tokens_N), objectives.entropy(logp_NV.detach())

    size = max(1, at_once // allowed_SV.shape[1])
    columns = hidden_NH, tokens_N, states_N
    if len(tokens_N) <= size:
        return some(*columns)
    again = torch.is_grad_enabled()
    chunks = zip(*(column.split(size) for column in columns), strict=True)
    found = [
        checkpoint(some, *chunk, use_reentrant=False, preserve_rng_state=False) if again else some(*chunk)
        for chunk in chunks
    ]
    logp, entropy = zip(*found, strict=True)
    return torch.cat(logp), torch.cat(entropy)
