"""What a search will cost, from a short calibration; and what it did cost, in the same words."""

from __future__ import annotations

import copy
import json
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich.table import Table

from rftt_lightning.core.contracts import Backend, ProblemSource, Reward, Usage, UserError
from rftt_lightning.search import driver
from rftt_lightning.search.expand import Expander

PLAN = "plan.json"
"""Name of the prediction in the folder of a search's store."""


@dataclass(frozen=True)
class Costs:
    """What a search costs: ``calls`` of the model, tokens generated and gone through the model, most bytes of keys and values,
    wall ``seconds``. ``idle`` is the share of these in which the model had nothing to do, ``rows`` the mean number of
    requests that it worked on at a time; ``failures`` were tried again."""

    trees: int = 0
    rollouts: int = 0
    calls: int = 0
    tokens: int = 0
    computed: int = 0
    cache_bytes: int = 0
    seconds: float = 0.0
    idle: float = 0.0
    rows: float = 0.0
    failures: dict[str, int] = field(default_factory=dict)

    @classmethod
    def of(cls, progress: driver.Progress, usage: Usage, before: Usage) -> Costs:
        """Those of a run, ``before`` which the backend had cost something already."""
        steps = usage.steps - before.steps
        return cls(
            trees=progress.trees,
            rollouts=progress.rollouts,
            calls=usage.calls - before.calls,
            tokens=progress.tokens,
            computed=progress.computed,
            cache_bytes=usage.cache_bytes,
            seconds=progress.seconds,
            idle=1 - min(progress.generate_seconds / max(progress.seconds, 1e-9), 1.0),
            rows=(usage.rows - before.rows) / steps if steps else 0.0,
            failures=dict(Counter(usage.failures) - Counter(before.failures)),
        )

    def __add__(self, other: Costs) -> Costs:
        """Of two runs, one after the other."""
        seconds = max(self.seconds + other.seconds, 1e-9)
        mine, theirs = self.seconds / seconds, other.seconds / seconds
        summed = ("trees", "rollouts", "calls", "tokens", "computed", "seconds")
        return Costs(
            **{name: getattr(self, name) + getattr(other, name) for name in summed},
            cache_bytes=max(self.cache_bytes, other.cache_bytes),
            idle=mine * self.idle + theirs * other.idle,
            rows=mine * self.rows + theirs * other.rows,
            failures=dict(Counter(self.failures) + Counter(other.failures)),
        )

    @classmethod
    def read(cls, path: Path, settings: Mapping[str, Any] | None = None) -> Costs | None:
        """Costs in a JSON file, None if there are none, or if they are of other ``settings``."""
        with suppress(OSError, ValueError, TypeError, KeyError):  # missing, or damaged
            data = json.loads(path.read_text(encoding="utf-8"))
            if settings is None or data["settings"] == json.loads(json.dumps(settings)):
                return cls(**data["costs"])
        return None

    def to_json(self) -> dict[str, Any]:
        return {"costs": asdict(self)}


def predict(
    source: ProblemSource,
    backend: Backend,
    expander: Expander,
    reward: Reward,
    *,
    seed: int,
    concurrency: int,
    parallel: int,
    limits: driver.Limits,
    seconds: float,
) -> tuple[Costs, Costs]:
    """Predicted costs of growing all trees, and those of the calibration that tells.

    As many trees as fill the batch, of problems spread over the source, begin rollouts for ``seconds``; all grows with the
    number of rollouts from there. Where that clock cut the trees short it is an upper bound, since later rollouts of a tree
    share more of it; the thinner batch at a run's end is not foreseen.
    """
    if seconds <= 0:
        raise UserError(f"plan_seconds is {seconds}; it must be above 0")
    problems = source.problems()
    width = min(max(backend.batch_size // parallel, 1), concurrency, len(problems))
    sample = [problems[i * len(problems) // width] for i in range(width)]
    progress, before = driver.Progress(), copy.deepcopy(backend.usage)
    full: Costs | None = None  # when the batch was last full

    def look(progress: driver.Progress) -> None:
        nonlocal full
        if not progress.trees and progress.seconds <= seconds:
            full = Costs.of(progress, backend.usage, before)

    clock = seconds if limits.seconds is None else min(seconds, limits.seconds)
    settings: dict[str, Any] = {"seed": seed, "concurrency": concurrency, "parallel": parallel}
    cut = driver.Limits(limits.tokens, clock)
    for _ in driver.grow(
        sample, expander, backend, reward, source, limits=cut, progress=progress, tick=look, **settings
    ):
        pass
    found = Costs.of(progress, backend.usage, before)
    short = found.seconds >= seconds and (limits.seconds is None or seconds < limits.seconds)
    rollouts = len(problems) * (expander.rollouts if short else found.rollouts / found.trees)
    kept = progress.useful * backend.usage.position_bytes, backend.usage.cache_budget
    return scaled(found, full or found, rollouts, len(problems), *kept), found


def scaled(found: Costs, full: Costs, rollouts: float, trees: int, kept: int, budget: int) -> Costs:
    """Costs of ``rollouts`` rollouts in ``trees`` trees, each as those ``found``, at the pace of a ``full`` batch; of the bytes
    found, ``kept`` were prefixes (as many as a ``budget`` lets be)."""
    scale = rollouts / found.rollouts
    pace = scale * _work(found) / max(_work(full), 1e-9)
    return Costs(
        trees=trees,
        rollouts=round(rollouts),
        calls=round(full.calls * pace),
        tokens=round(found.tokens * scale),
        computed=round(found.computed * scale),
        cache_bytes=round(min(kept * scale, budget)) + max(found.cache_bytes - min(kept, budget), 0),
        seconds=full.seconds * pace,
        idle=full.idle,
        rows=full.rows,
    )


def _work(costs: Costs) -> float:
    """Positions that went through the model, those of requests under way included where calls are of many rows."""
    return costs.calls * costs.rows or costs.computed


def table(title: str, **columns: Costs) -> Table:
    """Costs beside each other."""
    made = Table("", *columns, title=title)
    for name, write in ROWS.items():
        made.add_row(name, *(write(costs) for costs in columns.values()))
    return made


def _time(seconds: float) -> str:
    minutes, rest = divmod(seconds, 60)
    return f"{minutes // 60:.0f} h {minutes % 60:02.0f} min {rest:02.0f} s"


ROWS: dict[str, Callable[[Costs], str]] = {
    "trees": lambda c: f"{c.trees:,}",
    "rollouts": lambda c: f"{c.rollouts:,}",
    "calls of the model": lambda c: f"{c.calls:,}",
    "requests at a time": lambda c: f"{c.rows:.1f}" if c.rows else "-",
    "tokens generated": lambda c: f"{c.tokens:,}",
    "positions computed": lambda c: f"{c.computed:,}",
    "peak keys and values": lambda c: f"{c.cache_bytes / 2**30:.2f} GiB" if c.cache_bytes else "-",
    "time": lambda c: _time(c.seconds),
    "rollouts a minute": lambda c: f"{60 * c.rollouts / max(c.seconds, 1e-9):,.0f}",
    "model idle": lambda c: f"{100 * c.idle:.1f} %",
    "failures tried again": lambda c: ", ".join(f"{name} {n}" for name, n in sorted(c.failures.items())) or "0",
}
"""What a table of costs shows."""
