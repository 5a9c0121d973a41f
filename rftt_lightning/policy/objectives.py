"""Objectives as pure functions of tensors.

Shape suffixes: B rows, T response positions (each the prediction of one token), V vocabulary, N nodes of search trees.
``mask_BT`` is 1.0 on response tokens, 0.0 elsewhere; ``group_B`` numbers the problems from 0; ``node_BT`` is the number of the
segment's node (rollouts of a tree share the segments that they have in common), -1 outside the response. A reduction over the
batch takes its global denominator; groups and trees lie whole on one rank.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Reduce = Callable[[Tensor], Tensor]
"""Sum of a tensor over all ranks; the identity in a single process."""

EPS = 1e-6
"""Added to standard deviations: what has no spread has no advantage."""


def take(logp_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """Log-probabilities [B, T] of the tokens that were written."""
    return logp_BTV.gather(-1, tokens_BT[..., None])[..., 0]


def entropy(logp_BTV: Tensor) -> Tensor:
    """Entropy [B, T] in nats; impossible tokens (log-prob -inf) count nothing."""
    return -(logp_BTV.exp() * logp_BTV.masked_fill(logp_BTV == -torch.inf, 0.0)).sum(-1)


def kl_penalty(logp_BT: Tensor, reference_BT: Tensor, kind: str = "k1") -> Tensor:
    """Per-token estimates of KL(policy || reference) from the policy's samples (Schulman 2020): ``k1`` = log pi - log ref,
    ``k2`` = k1**2 / 2, ``k3`` = exp(-k1) - 1 + k1. k1 and k3 have the right mean; what is learned is the gradient, and that is
    another matter (arXiv 2506.09477, 2510.01555). Of the policy's own samples, expected:

    ====  ==================================================  =================================================
    ..    as a penalty in the reward                          as a loss
    ====  ==================================================  =================================================
    k1    gradient of KL(pi || ref), of the whole sequence    zero: noise alone
    k2    none of a divergence                                gradient of KL(pi || ref) token by token: what a
                                                              token does to those after it is left out
    k3    gradient of KL(pi || ref) minus KL(ref || pi)       gradient of KL(ref || pi) token by token (GRPO's)
    ====  ==================================================  =================================================
    """
    k1 = logp_BT - reference_BT
    if kind == "k1":
        return k1
    return k1.square() / 2 if kind == "k2" else (-k1).exp() - 1 + k1


def segment_ends(node_BT: Tensor) -> Tensor:
    """Bool [B, T]: the last token of each segment."""
    following_BT = torch.nn.functional.pad(node_BT[:, 1:], (0, 1), value=-1)
    return (node_BT >= 0) & (node_BT != following_BT)


def returns_to_go(rewards_BT: Tensor, gamma: float = 1.0, ends_BT: Tensor | None = None) -> Tensor:
    """G_t = r_t + gamma G_{t+1} along each row (arXiv 2501.03262, eq. 6); with ``ends_BT`` the discount is per segment: gamma
    at the last token of each, 1 within."""
    if gamma == 1.0:
        return rewards_BT.flip(1).cumsum(1).flip(1)
    discount_BT = torch.full_like(rewards_BT, gamma)
    if ends_BT is not None:
        discount_BT = discount_BT.masked_fill(~ends_BT, 1.0)
    out, following = torch.zeros_like(rewards_BT), torch.zeros_like(rewards_BT[:, 0])
    for t in range(rewards_BT.shape[1] - 1, -1, -1):
        following = rewards_BT[:, t] + discount_BT[:, t] * following
        out[:, t] = following
    return out


def whiten(
    value_BT: Tensor, mask_BT: Tensor, reduce: Reduce = lambda x: x, center: bool = True, eps: float = EPS
) -> Tensor:
    """(x - mean) / (std + eps) with the population moments of ALL response tokens of the global batch (arXiv 2501.03262, eq.
    8); 0 outside the mask. Without ``center`` the mean is not subtracted (group means were already)."""
    value_BT = value_BT * mask_BT
    count, total = reduce(torch.stack([mask_BT.sum(), value_BT.sum()]))
    mean = total / count.clamp(min=1)
    square = reduce(((value_BT - mean) * mask_BT).square().sum())
    std = (square / count.clamp(min=1)).sqrt()
    return (value_BT - (mean if center else 0.0)) / (std + eps) * mask_BT


# -- advantages of a rollout among those of its problem --------------------------------------------------------------------


def subtract_group_mean(value_B: Tensor, group_B: Tensor, leave_one_out: bool = False) -> Tensor:
    """Each row's value minus the mean of its problem's rows (REINFORCE++-baseline, arXiv 2501.03262; Dr. GRPO, arXiv
    2503.20783), or of the other ones (RLOO, arXiv 2402.14740); a row that is alone in its group becomes 0."""
    sums, sizes = _sums(value_B, group_B)
    if not leave_one_out:
        return value_B - (sums / sizes.clamp(min=1))[group_B]
    others = (sums[group_B] - value_B) / (sizes[group_B] - 1).clamp(min=1)
    return torch.where(sizes[group_B] > 1, value_B - others, 0.0)


def normalise_groups(value_B: Tensor, group_B: Tensor, eps: float = EPS) -> Tensor:
    """(x - mean) / (std + eps) with the population moments of each row's group (GRPO, arXiv 2402.03300, sec. 4.1.2)."""
    away_B = subtract_group_mean(value_B, group_B)
    squares, sizes = _sums(away_B.square(), group_B)
    return away_B / ((squares / sizes.clamp(min=1)).sqrt() + eps)[group_B]


def _sums(value_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and size of each group."""
    groups = int(group_B.max()) + 1 if len(group_B) else 0
    sums = torch.zeros(groups, dtype=value_B.dtype, device=value_B.device).index_add_(0, group_B, value_B)
    return sums, torch.bincount(group_B, minlength=groups).to(value_B.dtype)


# -- advantages in a tree --------------------------------------------------------------------------------------------------


class Forest(NamedTuple):
    """What rollouts say of the nodes that they pass: number of rollouts, their mean worth, the parent, the root. The root of
    group g is node ``N - groups + g``, its own parent; ``row`` and ``node`` list the nodes of each row from the top down."""

    count_N: Tensor
    worth_N: Tensor
    parent_N: Tensor
    root_N: Tensor
    row: Tensor
    node: Tensor


def forest(total_B: Tensor, node_BT: Tensor, group_B: Tensor) -> Forest:
    """The trees of a batch, with the worth ``total_B`` of its rollouts backed up: W / N of the search, over those rollouts that
    are in the batch and what training pays for them."""
    roots, rows = int(node_BT.max()) + 1 + group_B, torch.arange(len(group_B), device=group_B.device)
    before_BT = torch.nn.functional.pad(node_BT[:, :-1], (1, 0), value=-1)
    first_BT = (node_BT >= 0) & (node_BT != before_BT)
    row, node, above = first_BT.nonzero()[:, 0], node_BT[first_BT], before_BT[first_BT]
    above = torch.where(above < 0, roots[row], above)
    size = int(roots.max()) + 1
    through, passed = torch.cat([rows, row]), torch.cat([roots, node])
    count_N = torch.bincount(passed, minlength=size).to(total_B.dtype)
    worth_N = torch.zeros(size, dtype=total_B.dtype, device=total_B.device).index_add_(0, passed, total_B[through])
    parent_N = torch.arange(size, device=group_B.device).index_copy_(0, node, above)
    root_N = torch.arange(size, device=group_B.device).index_copy_(0, node, roots[row])
    return Forest(count_N, worth_N / count_N.clamp(min=1), parent_N, root_N, row, node)


def treerl(total_B: Tensor, node_BT: Tensor, group_B: Tensor) -> Tensor:
    """[B, T] global plus local advantage of each segment, ((V - V(root)) + (V - V(parent))) / sqrt(rollouts through it), V the
    mean worth of the rollouts below (arXiv 2506.11902, sec. 3.3)."""
    trees = forest(total_B, node_BT, group_B)
    gain_N = 2 * trees.worth_N - trees.worth_N[trees.root_N] - trees.worth_N[trees.parent_N]
    return _spread(gain_N / trees.count_N.clamp(min=1).sqrt(), node_BT)


def siblings(total_B: Tensor, node_BT: Tensor, group_B: Tensor) -> Tensor:
    """[B, T] each segment's V normalised among those of its siblings, each counted once: (V - mean) / (std + eps), 0 for an only
    child (arXiv 2506.05183)."""
    trees = forest(total_B, node_BT, group_B)
    visited = trees.node.unique()
    normal_N = torch.zeros_like(trees.worth_N)
    normal_N[visited] = normalise_groups(trees.worth_N[visited], trees.parent_N[visited])
    return _spread(normal_N, node_BT)


def treepo(total_B: Tensor, node_BT: Tensor, group_B: Tensor) -> Tensor:
    """[B] each rollout's worth minus the mean of its subgroup, averaged over its subgroups: all of the problem, and the
    rollouts through each node that it shares (arXiv 2508.17445, plain average of subgroups)."""
    trees = forest(total_B, node_BT, group_B)
    shared = trees.count_N[trees.node] > 1
    row, node = trees.row[shared], trees.node[shared]
    sums_B = trees.worth_N[-int(group_B.max()) - 1 :][group_B].index_add(0, row, trees.worth_N[node])
    return total_B - sums_B / (1 + torch.bincount(row, minlength=len(total_B)))


def _spread(value_N: Tensor, node_BT: Tensor) -> Tensor:
    """Each node's value on its tokens, 0 elsewhere."""
    return torch.where(node_BT >= 0, value_N[node_BT.clamp(min=0)], 0.0)


# -- weights and losses ----------------------------------------------------------------------------------------------------


def aggregate(weight_BT: Tensor, kind: str = "token", length: int = 1) -> tuple[Tensor, Tensor]:
    """Share of each token in the loss, and what the sum is to be divided by once it is summed over all ranks. ``token``: mean
    over tokens (arXiv 2503.14476); ``sequence``: mean over sequences of their means (arXiv 2402.03300, eq. 3);
    ``constant``: sum over tokens by ``length``, mean over sequences (arXiv 2503.20783). A sequence without weight is none."""
    total_B = weight_BT.sum(1)
    if kind == "token":
        return weight_BT, total_B.sum()
    by_B1 = torch.where(total_B > 0, total_B, 1.0)[:, None] if kind == "sequence" else length
    return weight_BT / by_B1, (total_B > 0).sum().to(weight_BT.dtype)


def importance(old_BT: Tensor, behaviour_BT: Tensor, kind: str = "none", cap: float = 2.0) -> Tensor:
    """Weight of each token by w = pi_old / pi_behaviour, for samplers whose probabilities are not the trainer's. ``truncated``:
    min(w, cap) (arXiv 2505.24034); ``masked``: w if it lies in 1 / cap .. cap, else 0 (arXiv 2510.18855); ``none``: 1."""
    if kind == "none":
        return torch.ones_like(old_BT)
    ratio_BT = (old_BT - behaviour_BT).exp()
    if kind == "truncated":
        return ratio_BT.clamp(max=cap)
    return ratio_BT.masked_fill((ratio_BT < 1 / cap) | (ratio_BT > cap), 0.0)


def sampler_gap(old_BT: Tensor, behaviour_BT: Tensor, sampled_BT: Tensor, reduce: Reduce = lambda x: x) -> Tensor:
    """How far the sampler's log-probs are from the trainer's: mean |log pi_old - log pi_behaviour| in nats over the sampled tokens
    (1.0 in ``sampled_BT``) of the global batch."""
    gap_BT = (old_BT - behaviour_BT).abs() * sampled_BT
    total, count = reduce(torch.stack([gap_BT.sum(), sampled_BT.sum()]))
    return total / count.clamp(min=1)


def ppo_loss(
    logp_BT: Tensor,
    old_BT: Tensor,
    advantage_BT: Tensor,
    weight_BT: Tensor,
    denominator: Tensor | float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> tuple[Tensor, Tensor]:
    """Clipped surrogate (arXiv 1707.06347, eq. 7; two bounds: arXiv 2503.14476), summed with ``weight_BT`` over tokens and divided
    by the GLOBAL denominator. Returns (loss, share of weighted tokens whose ratio was clipped)."""
    ratio_BT = ((logp_BT - old_BT) * (weight_BT > 0)).exp()
    clipped_BT = ratio_BT.clamp(1 - clip_low, 1 + clip_high)
    surrogate_BT = torch.minimum(ratio_BT * advantage_BT, clipped_BT * advantage_BT)
    active_BT = (clipped_BT * advantage_BT < ratio_BT * advantage_BT) * weight_BT
    return -(surrogate_BT * weight_BT).sum() / denominator, active_BT.sum() / denominator


def kl_loss(
    logp_BT: Tensor, reference_BT: Tensor, weight_BT: Tensor, denominator: Tensor | float, kind: str = "k2"
) -> Tensor:
    """:func:`kl_penalty` as a loss, summed with ``weight_BT`` over tokens and divided by the GLOBAL denominator."""
    counted_BT = weight_BT > 0  # what does not count may be anything
    kl_BT = kl_penalty(logp_BT * counted_BT, reference_BT * counted_BT, kind)
    return (kl_BT * weight_BT).sum() / denominator
