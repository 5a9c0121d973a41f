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
