"""Objectives as pure functions of tensors.

Shape suffixes: B rows, T response positions (each the prediction of one token), V vocabulary. ``mask_BT`` is 1.0 on response
tokens, 0.0 elsewhere. A reduction over the batch takes its global denominator.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sum of a tensor over all ranks; the identity in a single process."""


def take(logp_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Log-probabilities [B, T] of the tokens that were written."""
    return logp_BTV.gather(-1, tokens_BT[..., None])[..., 0]


def entropy(logp_BTV: Tensor) -> Tensor:
    """Entropy [B, T] in nats; impossible tokens (log-prob -inf) count nothing."""
    return -(logp_BTV.exp() * logp_BTV.masked_fill(logp_BTV == -torch.inf, 0.0)).sum(-1)


def kl_penalty(logp_BT: Tensor, reference_BT: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimates of KL(policy || reference) from the policy's samples (Schulman 2020): k1 = log pi - log ref, k2 =
    k1**2 / 2, k3 = exp(-k1) - 1 + k1."""
    k1 = logp_BT - reference_BT
    if kind == "k1":
        return k1
    return k1.square() / 2 if kind == "k2" else (-k1).exp() - 1 + k1


def returns_to_go(rewards_BT: Tensor, gamma: float = 1.0) -> Tensor:
    """G_t = r_t + gamma G_{t+1} along each row (arXiv 2501.03262, eq. 6)."""
    if gamma == 1.0:
        return rewards_BT.flip(1).cumsum(1).flip(1)
    out, following = torch.zeros_like(rewards_BT), torch.zeros_like(rewards_BT[:, 0])
    for t in range(rewards_BT.shape[1] - 1, -1, -1):
        following = rewards_BT[:, t] + gamma * following
        out[:, t] = following
    return out


def subtract_group_mean(value_B: Tensor, group_B: Tensor, leave_one_out: bool = False) -> Tensor:
    """Each row's value minus the mean of its problem's rows (REINFORCE++-baseline), or of the other ones; a row that is alone
    in its group becomes 0. ``group_B`` holds numbers from 0."""
    groups = int(group_B.max()) + 1
    sums = torch.zeros(groups, dtype=value_B.dtype, device=value_B.device).index_add_(0, group_B, value_B)
    sizes = torch.bincount(group_B, minlength=groups).to(value_B.dtype)
    if not leave_one_out:
        return value_B - (sums / sizes.clamp(min=1))[group_B]
    others = (sums[group_B] - value_B) / (sizes[group_B] - 1).clamp(min=1)
    return torch.where(sizes[group_B] > 1, value_B - others, 0.0)


def whiten(
    value_BT: Tensor, mask_BT: Tensor, reduce: Reduce = lambda x: x, center: bool = True, eps: float = 1e-6
) -> Tensor:
    """(x - mean) / (std + eps) with the population moments of ALL response tokens of the global batch (arXiv 2501.03262, eq.
    8); 0 outside the mask. Without ``center`` the mean is not subtracted (group means were already)."""
    value_BT = value_BT * mask_BT
    count, total = reduce(torch.stack([mask_BT.sum(), value_BT.sum()]))
    mean = total / count.clamp(min=1)
    square = reduce(((value_BT - mean) * mask_BT).square().sum())
    std = (square / count.clamp(min=1)).sqrt()
    return (value_BT - (mean if center else 0.0)) / (std + eps) * mask_BT


def ppo_loss(
    logp_BT: Tensor,
    old_BT: Tensor,
    advantage_BT: Tensor,
    weight_BT: Tensor,
    denominator: Tensor | float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate (arXiv 1707.06347, eq. 7), summed with ``weight_BT`` over tokens and divided by the GLOBAL denominator.
    Returns (loss, share of weighted tokens whose ratio was clipped)."""
    ratio_BT = ((logp_BT - old_BT) * (weight_BT > 0)).exp()
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    surrogate_BT = torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
    active_BT = (clipped_BT * advantage_BT < ratio_BT * advantage_BT) * weight_BT
    return -(surrogate_BT * weight_BT).sum() / denominator, active_BT.sum() / denominator
