"""Slow, obvious versions in plain loops, which judge the fast ones."""

from __future__ import annotations

import math


def returns_to_go(rewards: list[list[float]], gamma: float) -> list[list[float]]:
    out = []
    for row in rewards:
        out.append([sum(gamma ** (j - i) * row[j] for j in range(i, len(row))) for i in range(len(row))])
    return out


def whiten(values: list[list[float]], mask: list[list[float]], center: bool, eps: float = 1e-6) -> list[list[float]]:
    kept = [v for row, keep in zip(values, mask, strict=True) for v, k in zip(row, keep, strict=True) if k]
    mean = sum(kept) / max(len(kept), 1)
    std = math.sqrt(sum((v - mean) ** 2 for v in kept) / max(len(kept), 1))
    if std < 1e-12 * abs(mean):
        return [[0.0] * len(row) for row in values]
    shift = mean if center else 0.0
    return [
        [(v - shift) / (std + eps) if k else 0.0 for v, k in zip(row, keep, strict=True)]
        for row, keep in zip(values, mask, strict=True)
    ]


def group_baseline(values: list[float], groups: list[int], leave_one_out: bool) -> list[float]:
    out = []
    for i, (value, group) in enumerate(zip(values, groups, strict=True)):
        others = [
            v
            for j, (v, g) in enumerate(zip(values, groups, strict=True))
            if g == group and not (leave_one_out and j == i)
        ]
        out.append(value - sum(others) / len(others) if others else 0.0)
    return out


def ppo(logp, old, advantage, weight, denominator: float, low: float, high: float) -> tuple[float, float]:  # type: ignore[no-untyped-def]
    loss = clipped = 0.0
    for rows in zip(logp, old, advantage, weight, strict=True):
        for new, before, gain, w in zip(*rows, strict=True):
            if not w:
                continue
            ratio = math.exp(new - before)
            bounded = min(max(ratio, 1 - low), 1 + high)
            loss -= w * min(ratio * gain, bounded * gain)
            clipped += w * (bounded * gain < ratio * gain)
    return loss / denominator, clipped / denominator


def kl(policy: float, reference: float, kind: str) -> float:
    ratio = math.exp(reference - policy)
    return {"k1": -math.log(ratio), "k2": math.log(ratio) ** 2 / 2, "k3": ratio - 1 - math.log(ratio)}[kind]


def kl_loss(policy, reference, weight, denominator: float, kind: str) -> float:  # type: ignore[no-untyped-def]
    total = 0.0
    for rows in zip(policy, reference, weight, strict=True):
        for new, old, w in zip(*rows, strict=True):
            total += w * kl(new, old, kind) if w else 0.0
    return total / denominator


def returns_by_segment(rewards: list[list[float]], nodes: list[list[int]], gamma: float) -> list[list[float]]:
    """What token j pays token i is discounted once for each segment that ends in between."""
    out = []
    for row, places in zip(rewards, nodes, strict=True):
        gains = []
        for i in range(len(row)):
            total = 0.0
            for j in range(i, len(row)):
                ended = sum(places[k] >= 0 and (k + 1 == len(row) or places[k + 1] != places[k]) for k in range(i, j))
                total += gamma**ended * row[j]
            gains.append(total)
        out.append(gains)
    return out


def spread(values: list[float]) -> float:
    mean = sum(values) / len(values)
    return math.sqrt(sum((v - mean) ** 2 for v in values) / len(values))


def grpo(values: list[float], groups: list[int], eps: float = 1e-6) -> list[float]:
    out = []
    for value, group in zip(values, groups, strict=True):
        of_group = [v for v, g in zip(values, groups, strict=True) if g == group]
        out.append((value - sum(of_group) / len(of_group)) / (spread(of_group) + eps))
    return out


def worth(node: int, values: list[float], paths: list[list[int]]) -> float:
    """Mean value of the rollouts through a node."""
    below = [v for v, path in zip(values, paths, strict=True) if node in path]
    return sum(below) / len(below)


def root_worth(group: int, values: list[float], groups: list[int]) -> float:
    of_group = [v for v, g in zip(values, groups, strict=True) if g == group]
    return sum(of_group) / len(of_group)


def treerl(values: list[float], paths: list[list[int]], groups: list[int]) -> list[list[float]]:
    """By rollout, one number for each node of its path."""
    out = []
    for path, group in zip(paths, groups, strict=True):
        root = root_worth(group, values, groups)
        gains = []
        for depth, node in enumerate(path):
            parent = worth(path[depth - 1], values, paths) if depth else root
            here, through = worth(node, values, paths), sum(node in other for other in paths)
            gains.append(((here - root) + (here - parent)) / math.sqrt(through))
        out.append(gains)
    return out


def siblings(values: list[float], paths: list[list[int]], groups: list[int], eps: float = 1e-6) -> list[list[float]]:
    """By rollout, one number for each node of its path."""
    out = []
    for path, group in zip(paths, groups, strict=True):
        gains = []
        for depth, node in enumerate(path):
            family = {
                other[depth]
                for other, its_group in zip(paths, groups, strict=True)
                if its_group == group and len(other) > depth and other[:depth] == path[:depth]
            }
            worths = [worth(k, values, paths) for k in sorted(family)]
            gains.append((worth(node, values, paths) - sum(worths) / len(worths)) / (spread(worths) + eps))
        out.append(gains)
    return out


def treepo(values: list[float], paths: list[list[int]], groups: list[int]) -> list[float]:
    out = []
    for value, path, group in zip(values, paths, groups, strict=True):
        gains = [value - root_worth(group, values, groups)]
        gains += [value - worth(node, values, paths) for node in path if sum(node in other for other in paths) > 1]
        out.append(sum(gains) / len(gains))
    return out


def aggregate(losses, weights, kind: str, length: int) -> float:  # type: ignore[no-untyped-def]
    """The loss of a batch from those of its tokens."""
    if kind == "token":
        total = sum(sum(row) for row in weights)
        return sum(w * x for ws, xs in zip(weights, losses, strict=True) for w, x in zip(ws, xs, strict=True)) / total
    means = []
    for ws, xs in zip(weights, losses, strict=True):
        if sum(ws) > 0:
            by = sum(ws) if kind == "sequence" else length
            means.append(sum(w * x for w, x in zip(ws, xs, strict=True)) / by)
    return sum(means) / len(means)


def importance(old: float, behaviour: float, kind: str, cap: float) -> float:
    weight = math.exp(old) / math.exp(behaviour)
    if kind == "truncated":
        return min(weight, cap)
    return weight if kind == "masked" and 1 / cap <= weight <= cap else float(kind == "none")
