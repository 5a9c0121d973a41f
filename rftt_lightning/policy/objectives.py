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
"""Added to standard deviations. What has no spread has no advantage, and what differs by :func:`rounding` alone has none."""


def rounding(value: Tensor) -> Tensor:
    """How far apart numbers of this size may come out that ought to be equal: some units in the last place."""
    return 32 * torch.finfo(value.dtype).eps * value.abs()


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
    match kind:
        case "k1":
            return k1
        case "k2":
            return k1.square() / 2
        case "k3":
            return (-k1).exp() - 1 + k1
    raise ValueError(f"no KL estimate {kind!r}")


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
    8); 0 outside the mask, and everywhere if all are equal. Without ``center`` the mean is not subtracted (group means were
    already)."""
    value_BT = value_BT * mask_BT
    count, total = reduce(torch.stack([mask_BT.sum(), value_BT.sum()]))
    mean = total / count.clamp(min=1)
    square = reduce(((value_BT - mean) * mask_BT).square().sum())
    std = (square / count.clamp(min=1)).sqrt()
    scaled_BT = (value_BT - (mean if center else 0.0)) / (std + eps) * mask_BT
    return torch.where(std > rounding(mean), scaled_BT, 0.0)


# -- advantages of a rollout among those of its problem --------------------------------------------------------------------


def subtract_group_mean(value_B: Tensor, group_B: Tensor, leave_one_out: bool = False) -> Tensor:
    """Each row's value minus the mean of its problem's rows (REINFORCE++-baseline, arXiv 2501.03262; Dr. GRPO, arXiv
    2503.20783), or of the other ones (RLOO, arXiv 2402.14740, x_i - sum over j != i of x_j / (n - 1)); a row that is alone in its
    group becomes 0. Equal rows of a group are 0 up to rounding, and exactly 0 where no group has rows that differ, so that what
    scales them finds no noise."""
    sums, sizes = _sums(value_B, group_B)
    alone, means = int(leave_one_out), sums[group_B] - (value_B if leave_one_out else 0.0)
    away_B = value_B - means / (sizes[group_B] - alone).clamp(min=1)
    low_B, high_B = _range(value_B, group_B)
    return torch.where((sizes[group_B] > 1) & (high_B > low_B).any(), away_B, 0.0)


def normalise_groups(value_B: Tensor, group_B: Tensor, eps: float = EPS) -> Tensor:
    """(x - mean) / (std + eps) with the population moments of each row's group (GRPO, arXiv 2402.03300, sec. 4.1.2)."""
    away_B = subtract_group_mean(value_B, group_B)
    squares, sizes = _sums(away_B.square(), group_B)
    low_B, high_B = _range(value_B, group_B)
    return torch.where(high_B > low_B, away_B / ((squares / sizes.clamp(min=1)).sqrt() + eps)[group_B], 0.0)


def _range(value_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Lowest and highest value of each row's group; the same number twice if they differ by rounding alone."""
    groups = int(group_B.max()) + 1 if len(group_B) else 0
    none = torch.zeros(groups, dtype=value_B.dtype, device=value_B.device)
    low_B, high_B = (
        none.scatter_reduce(0, group_B, value_B, how, include_self=False)[group_B] for how in ("amin", "amax")
    )
    size_B = torch.maximum(low_B.abs(), high_B.abs())
    return low_B, torch.where(high_B - low_B > rounding(size_B), high_B, low_B)


def _sums(value_B: Tensor, group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and size of each group."""
    groups = int(group_B.max()) + 1 if len(group_B) else 0
    sums = torch.zeros(groups, dtype=value_B.dtype, device=value_B.device).index_add_(0, group_B, value_B)
    return sums, torch.bincount(group_B, minlength=groups).to(value_B.dtype)


# -- advantages in a tree --------------------------------------------------------------------------------------------------


class Forest(NamedTuple):
    """What rollouts say of the nodes that they pass. ``total_B``: by how much each is better than its problem's worst, all 0 if
    they are equal; of each node the number of rollouts, their mean ``total``, the parent, the root. The root of group g is node
    ``N - groups + g``, its own parent; ``row`` and ``node`` list the nodes of each row from the top down."""

    total_B: Tensor
    count_N: Tensor
    worth_N: Tensor
    parent_N: Tensor
    root_N: Tensor
    row: Tensor
    node: Tensor


def forest(total_B: Tensor, node_BT: Tensor, group_B: Tensor) -> Forest:
    """The trees of a batch, with the worth ``total_B`` of its rollouts backed up: W / N of the search, over those rollouts that
    are in the batch and what training pays for them."""
    low_B, high_B = _range(total_B, group_B)
    total_B = torch.where(high_B > low_B, total_B - low_B, 0.0)
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
    return Forest(total_B, count_N, worth_N / count_N.clamp(min=1), parent_N, root_N, row, node)


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
    return trees.total_B - sums_B / (1 + torch.bincount(row, minlength=len(total_B)))


def _spread(value_N: Tensor, node_BT: Tensor) -> Tensor:
    """Each node's value on its tokens, 0 elsewhere."""
    return torch.where(node_BT >= 0, value_N[node_BT.clamp(min=0)], 0.0)


# -- advantages by name ----------------------------------------------------------------------------------------------------

ADVANTAGES = (
    *("return", "reinforce++", "reinforce++-baseline"),
    *("grpo", "dr.grpo", "rloo", "treerl", "treepo", "siblings"),
)


def advantages(
    name: str,
    rewards_BT: Tensor,
    penalty_BT: Tensor,
    mask_BT: Tensor,
    node_BT: Tensor,
    group_B: Tensor,
    gamma: float = 1.0,
    gamma_per: str = "token",
    reduce: Reduce = lambda x: x,
) -> Tensor:
    """Advantages [B, T] of one of :data:`ADVANTAGES`, 0 outside the response. ``rewards_BT`` are paid at the ends of segments,
    ``penalty_BT``, the weighted KL, is taken off every token. G is the return-to-go of a token, R that of a row's first, n the
    number of rollouts of its problem. A row without response tokens is no rollout of its problem.

    * ``return``: G as it is. With rewards of 1 and 0 at the answer and no KL the loss is that of SFT on the right rollouts alone:
      on-policy rejection sampling (RAFT, arXiv 2304.06767; its clipped form is RAFT++ of arXiv 2504.11343).
    * ``reinforce++``: (G - mean) / (std + eps) over the tokens of the global batch (arXiv 2501.03262, eq. 8).
    * ``reinforce++-baseline``: G less the problem's mean total reward, by (std + eps) over the tokens of the global batch. OpenRLHF
      also subtracts the mean over tokens, which is not 0 where right and wrong rollouts differ in length. The problem's mean
      leaves the penalty out. The paper's own has a k2 loss beside the policy's (arXiv 2501.03262, the variant with a group mean).
      It is written for one reward at the end. Steps that are paid before it should be centred: a token late in the path has
      less to come than the mean of whole paths, so that equal rollouts of steps paid 1 have advantages 0, -1, -2, ...
    * ``grpo``: (R - mean) / (std + eps) among the problem's rollouts (arXiv 2402.03300, sec. 4.1.2). ``dr.grpo``: R - mean (arXiv
      2503.20783). ``rloo``: R - mean of the n - 1 OTHER rollouts (arXiv 2402.14740).
    * ``treerl``: :func:`treerl`. ``siblings``: :func:`siblings`. ``treepo``: :func:`treepo`, then as reinforce++. Means are over
      the rollouts that search made: where it chose among children, they are those of its choices, not of the policy alone.
    """
    if name not in ADVANTAGES:
        raise ValueError(f"no advantage {name!r}")
    live_B = mask_BT.sum(1) > 0
    if live_B.any() and not live_B.all():
        some = rewards_BT[live_B], penalty_BT[live_B], mask_BT[live_B], node_BT[live_B], group_B[live_B]
        out_BT = torch.zeros_like(rewards_BT)
        out_BT[live_B] = advantages(name, *some, gamma, gamma_per, reduce)
        return out_BT
    if name == "reinforce++-baseline":  # off the last response token, so that it reaches all of them
        total_B = rewards_BT.sum(1)
        offset_B = subtract_group_mean(total_B, group_B) - total_B
        rewards_BT = rewards_BT.scatter_add(1, last_positions(mask_BT)[:, None], offset_B[:, None])
    ends_BT = segment_ends(node_BT) if gamma_per == "segment" else None
    returns_BT = returns_to_go(rewards_BT - penalty_BT * mask_BT, gamma, ends_BT)
    if name.startswith("reinforce++"):
        return whiten(returns_BT, mask_BT, reduce, center=name == "reinforce++")
    if name == "return":
        return returns_BT * mask_BT
    total_B = returns_BT.gather(1, mask_BT.argmax(1, keepdim=True))[:, 0]
    match name:
        case "treerl":
            return treerl(total_B, node_BT, group_B) * mask_BT
        case "siblings":
            return siblings(total_B, node_BT, group_B) * mask_BT
        case "treepo":
            return whiten(treepo(total_B, node_BT, group_B)[:, None] * mask_BT, mask_BT, reduce)
        case "grpo":
            gain_B = normalise_groups(total_B, group_B)
        case _:
            gain_B = subtract_group_mean(total_B, group_B, leave_one_out=name == "rloo")
    return gain_B[:, None] * mask_BT


def last_positions(mask_BT: Tensor) -> Tensor:
    """Index [B] of each row's last response position."""
    return mask_BT.shape[1] - 1 - mask_BT.flip(1).argmax(1)


# -- weights and losses ----------------------------------------------------------------------------------------------------


def aggregate(weight_BT: Tensor, kind: str = "token", length: int = 1) -> tuple[Tensor, Tensor]:
    """Share of each token in the loss, and what the sum is to be divided by once it is summed over all ranks. ``token``: mean
    over tokens (arXiv 2503.14476); ``sequence``: mean over sequences of their means (arXiv 2402.03300, eq. 3);
    ``constant``: sum over tokens by ``length``, mean over sequences (arXiv 2503.20783). A sequence without weight is none."""
    if kind not in ("token", "sequence", "constant"):
        raise ValueError(f"no aggregation {kind!r}")
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
    if kind == "masked":
        return ratio_BT.masked_fill((ratio_BT < 1 / cap) | (ratio_BT > cap), 0.0)
    raise ValueError(f"no importance correction {kind!r}")


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
