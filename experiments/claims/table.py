"""The table of a sweep's claims: ``python experiments/claims/table.py runs/claims/countdown``.

Arms answered the same problems, so differences are taken problem by problem. The interval (95 %) is that of a bootstrap over
problems and seeds together. A claim is supported, or contradicted, if its interval excludes 0 and the seeds agree in sign.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from rftt_lightning.core.contracts import ProblemSource, Rollout
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.search.store import read_trees
from rftt_lightning.search.vote import vote
from rftt_lightning.training.measures import attempts

DRAWS = 10_000
SAME = 0.02
"""A control is held to its word if its gain is below this, or its interval holds 0."""


class Claim(NamedTuple):
    """That the arm ``first`` is better than ``second``; a control must not be (``helps`` False). An arm is the name after
    ``evaluate_``; ``rl/majority/16`` is the majority vote of its search's first 16 rollouts."""

    text: str
    first: str
    second: str
    helps: bool = True


CLAIMS = (
    Claim("SFT on annotated trees beats the base", "sft", "base"),
    Claim("RL beats the warm-up that it began at", "rl", "sft"),
    Claim("RL beats the strongest SFT", "rl", "sft_best"),
    Claim("RL beats the strongest SFT, beginning there", "rl_best", "sft_best"),
    Claim("RL ends higher from the strongest SFT than from the warm-up", "rl_best", "rl"),
    Claim("more steps of RL gain more", "rl_more", "rl_best"),
    Claim("RL of more steps beats the strongest SFT, beginning there", "rl_more", "sft_best"),
    Claim("REINFORCE++ beats on-policy rejection sampling", "rl", "rejection"),
    Claim("the tree beats plain sampling", "rl", "sampling"),
    Claim("outcome and process reward beat the outcome alone", "rl", "orm"),
    Claim("RL needs the warm-up", "rl", "no_warmup"),
    Claim("verify and refine help, masked at inference", "rl", "rl_masked"),
    Claim("verify and refine help, masked in training, too", "rl", "no_checks"),
    Claim("tokens that search forces beat tokens that it draws", "legal", "rl"),
    Claim("forced tokens are better kept than masked", "legal", "legal_masked"),
    Claim("tags as rows of the vocabulary beat tags as text, after SFT", "sft", "sft_text"),
    Claim("tags as rows of the vocabulary beat tags as text, after RL by sampling", "sampling", "text"),
    Claim("16 rollouts beat 1", "rl/majority/16", "rl/majority/1"),
    Claim("search over functional tokens helps the warm-up, too", "sft/majority/16", "sft"),
    Claim("control: a random reward teaches nothing", "random", "sft", helps=False),
    Claim("control: a reward for form alone teaches nothing", "format_only", "sft", helps=False),
)
"""What the paper says, each against its fair control."""

COUNTS = ("tokens", "verify", "refine")
"""Columns of numbers an answer; the others are per cent of answers, segments or steps."""


class Difference(NamedTuple):
    """Mean gain of one arm over another with its interval, and each seed's."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]

    def verdict(self, helps: bool) -> str:
        agree = len({np.sign(gain) for gain in self.seeds}) == 1
        if not helps:
            return "contradicts" if self.low > 0 and agree and self.mean > SAME else "supports"
        if agree and self.low > 0:
            return "supports"
        return "contradicts" if agree and self.high < 0 else "no difference seen"


def difference(first: np.ndarray, second: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Of two arms' answers [seeds, problems], 1 where right."""
    gain_SP = first.astype(float) - second.astype(float)
    rng = np.random.default_rng(seed)
    seeds, problems = gain_SP.shape
    means = [
        gain_SP[rng.integers(seeds, size=seeds)][:, rng.integers(problems, size=problems)].mean() for _ in range(draws)
    ]
    low, high = np.quantile(means, [0.025, 0.975])
    return Difference(float(gain_SP.mean()), float(low), float(high), tuple(gain_SP.mean(1).tolist()))


class Sweep:
    """What the evaluations below a folder answered."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seeds = sorted(out.glob("seed-*"), key=lambda folder: int(folder.name.removeprefix("seed-")))

    def folder(self, seed: Path, arm: str) -> Path:
        """``evaluate_<arm>`` of a seed, or the one that all seeds share."""
        name = f"evaluate_{arm}"
        return seed / name if (seed / name).exists() else self.out / name

    def ran(self, arm: str) -> bool:
        """Is the evaluation finished in all seeds?"""
        name, _, how = arm.partition("/")
        folders = [self.folder(seed, name) for seed in self.seeds]
        stores = [folder / ("search" if how else "greedy") for folder in folders]
        return all(path.exists() for path in (*stores, *(folder / "results.json" for folder in folders)))

    def right(self, arm: str) -> np.ndarray:
        """[seeds, problems] in the order of the problems' names."""
        rows = [self._right(seed, *arm.split("/")) for seed in self.seeds]
        names = sorted(rows[0])
        if any(sorted(row) != names for row in rows):
            raise SystemExit(f"the seeds of {arm} answered different problems")
        return np.array([[row[name] for name in names] for row in rows])

    def _right(self, seed: Path, arm: str, how: str = "greedy", count: str = "1") -> dict[str, bool]:
        if how == "greedy":
            return {r.problem.id: bool(r.score and r.score.verdict.right) for r in self.greedy(seed, arm)}
        found = {}
        for tree in read_trees(self.folder(seed, arm) / "search"):
            winner = vote(tree.rollouts()[: int(count)])
            found[tree.problem.id] = bool(winner and winner.score and winner.score.verdict.right)
        return found

    def greedy(self, seed: Path, arm: str) -> list[Rollout]:
        return [tree.rollouts()[0] for tree in read_trees(self.folder(seed, arm) / "greedy")]


def mechanism(rollouts: Sequence[Rollout], source: ProblemSource) -> dict[str, float]:
    """Where an arm's answers stand: is the first attempt chosen better, are more of them mended, are steps right by the domain's
    exact checker, are segments broken?"""
    used, scored, right = Counter[str](), Counter[str](), Counter[str]()
    for rollout in rollouts:
        for (tag, _), score in zip(rollout.steps, source.check_steps(rollout.problem, rollout.steps), strict=True):
            used[tag] += 1
            if score is not None:
                scored[tag] += 1
                right[tag] += score > 0.5
    n = len(rollouts)
    pairs = attempts(rollouts, source, TokenTable.from_yaml())
    ends = sum(bool(rollout.score and rollout.score.verdict.right) for rollout in rollouts)
    segments = [segment for rollout in rollouts for segment in rollout.segments]
    return {
        "tokens": sum(rollout.length for rollout in rollouts) / n,
        "unfinished": sum(not rollout.complete for rollout in rollouts) / n,
        "malformed": sum(not segment.closed for segment in segments) / max(len(segments), 1),
        "verify": used["verify"] / n,
        "refine": used["refine"] / n,
        "first attempt": (ends - sum(after for _, after in pairs) + sum(before for before, _ in pairs)) / n,
        "mended": sum(pair == (False, True) for pair in pairs) / n,
        "spoilt": sum(pair == (True, False) for pair in pairs) / n,
        **{f"{tag} right": right[tag] / scored[tag] for tag in scored},
    }


def lines(table: Sequence[Sequence[str]]) -> str:
    head, *rows = table
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def per_cent(value: float, sign: bool = False) -> str:
    return f"{100 * value:{'+' if sign else ''}.1f}"


def report(sweep: Sweep, source: ProblemSource) -> tuple[str, dict[str, Any]]:
    """Markdown tables, and the same as data."""
    known = {p.name.removeprefix("evaluate_") for place in (*sweep.seeds, sweep.out) for p in place.glob("evaluate_*")}
    data: dict[str, Any] = {"claims": [], "arms": {}}
    rows = [["claim", "gain", "95 % interval", "by seed", "verdict"]]
    for claim in CLAIMS:
        if not (sweep.ran(claim.first) and sweep.ran(claim.second)):
            continue  # an arm of another world, or not run yet
        found = difference(sweep.right(claim.first), sweep.right(claim.second))
        verdict = found.verdict(claim.helps)
        gains = ", ".join(per_cent(gain, sign=True) for gain in found.seeds)
        interval = f"[{per_cent(found.low, sign=True)}, {per_cent(found.high, sign=True)}]"
        rows.append([claim.text, per_cent(found.mean, sign=True), interval, gains, verdict])
        data["claims"].append({**claim._asdict(), **found._asdict(), "verdict": verdict})
    columns = ("tokens", "unfinished", "malformed", "verify", "refine", "first attempt", "mended", "spoilt")
    arms = [["arm", "accuracy by seed", *columns, "steps right"]]
    for arm in filter(sweep.ran, sorted(known)):
        seeds = [mechanism(sweep.greedy(seed, arm), source) for seed in sweep.seeds]
        means = {key: float(np.mean([seed[key] for seed in seeds if key in seed])) for seed in seeds for key in seed}
        accuracy = sweep.right(arm).mean(1).tolist()
        data["arms"][arm] = {"accuracy": accuracy, **means}
        steps = [f"{key.removesuffix(' right')} {per_cent(v)}" for key, v in means.items() if key.endswith(" right")]
        cells = [f"{means[key]:.1f}" if key in COUNTS else per_cent(means[key]) for key in columns]
        arms.append([arm, ", ".join(map(per_cent, accuracy)), *cells, ", ".join(steps)])
    return f"{lines(rows)}\n\n{lines(arms)}\n", data


def cost(out: Path) -> dict[str, Any]:
    """What the sweep's ``stages.json`` says: how many runs, minutes in all, minutes of all runs added, the longest run."""
    record = out / "stages.json"
    if not record.exists():
        return {}
    known = json.loads(record.read_text(encoding="utf-8"))
    longest = max(known["seconds"], key=known["seconds"].get)
    return {
        "runs": len(known["seconds"]),
        "minutes": known["total"] / 60,
        "minutes of runs": sum(known["seconds"].values()) / 60,
        "longest": longest,
        "minutes of the longest": known["seconds"][longest] / 60,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="folder of the sweep")
    parser.add_argument(
        "--source", default="rftt_lightning.tiny.countdown.Countdown", help="whose exact checker judges steps"
    )
    options = parser.parse_args()
    module, _, name = options.source.rpartition(".")
    text, data = report(Sweep(options.out), getattr(import_module(module), name)())
    if spent := cost(options.out):
        data["cost"] = spent
        shown = (f"{key} {value:.0f}" if isinstance(value, float) else f"{key} {value}" for key, value in spent.items())
        text += f"\n{', '.join(shown)}\n"
    (options.out / "claims.md").write_text(text, encoding="utf-8")
    (options.out / "claims.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
