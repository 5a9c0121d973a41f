"""The table of a sweep's claims: ``python experiments/claims/table.py runs/claims/countdown``.

Arms answered the same problems, so differences are taken problem by problem. Seeds and problems are both samples: the interval
(95 %) is that of crossed random effects. A claim is supported, or contradicted, if its interval excludes 0; how sure that is among
as many rows says the p-value of Holm.

Shape suffixes: S seeds, P problems.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from scipy import stats

from rftt_lightning.core.contracts import ProblemSource, Rollout
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.search.store import read_trees
from rftt_lightning.search.vote import vote
from rftt_lightning.training.measures import attempts

SAME = 0.02
"""A control is held to its word if its gain is less, with all of its interval."""


FEW = 50
"""Steps of a seed; of fewer a share says nothing."""


class Claim(NamedTuple):
    """That the arm ``first`` is better than ``second``; a control must not be (``helps`` False). An arm is the name after
    ``evaluate_``; ``rl/majority/16`` is the majority vote of its search's first 16 rollouts. Better is a greater share of right
    answers, or of ``steps``, see :func:`judged`."""

    text: str
    first: str
    second: str
    helps: bool = True
    steps: str = ""


CLAIMS = (
    Claim("SFT on annotated trees beats the base", "sft", "base"),
    Claim("RL beats the warm-up that it began at", "rl", "sft"),
    Claim("RL beats the strongest SFT", "rl", "sft_best"),
    Claim("RL beats the strongest SFT, beginning there", "rl_best", "sft_best"),
    Claim("RL ends higher from the strongest SFT than from the warm-up", "rl_best", "rl"),
    Claim("more steps of RL gain more", "rl_more", "rl_best"),
    Claim("RL of more steps beats the strongest SFT, beginning there", "rl_more", "sft_best"),
    Claim("on-policy rejection sampling beats the strongest SFT", "rejection", "sft_best"),
    Claim("REINFORCE++, outcome alone, beats on-policy rejection sampling", "orm", "rejection"),
    Claim("REINFORCE++ with a process reward beats on-policy rejection sampling", "rl", "rejection"),
    Claim("the tree beats plain sampling", "rl", "sampling"),
    Claim("outcome and process reward beat the outcome alone", "rl", "orm"),
    Claim("the process reward keeps verify's verdicts right", "rl", "orm", steps="verify"),
    Claim("the process reward keeps refine's steps right, and new", "rl", "orm", steps="refine"),
    Claim("the process reward keeps finishing steps right, and new", "rl", "orm", steps="direct_answer"),
    Claim("the process reward keeps refine from the step just refuted", "rl", "orm", steps="refine new"),
    Claim("the process reward keeps attempts from being repeated", "rl", "orm", steps="attempt new"),
    Claim("more steps of RL keep attempts from being repeated", "rl_more", "rl_best", steps="attempt new"),
    Claim("a learned PRM's value, of all steps, beats the outcome alone", "rl_prm", "orm"),
    Claim("a learned PRM's value keeps verify's verdicts right", "rl_prm", "orm", steps="verify"),
    Claim("a learned PRM's value keeps refine's steps right, and new", "rl_prm", "orm", steps="refine"),
    Claim("a learned PRM's progress, checks unpaid, beats the outcome alone", "rl_progress", "orm"),
    Claim(
        "a learned PRM's progress, checks unpaid, keeps verify's verdicts right", "rl_progress", "orm", steps="verify"
    ),
    Claim("RL needs the warm-up", "rl", "no_warmup"),
    Claim("verify and refine help, masked at inference", "rl", "rl_masked"),
    Claim("verify and refine help, masked in training, too", "rl", "no_checks"),
    Claim("the paper's tree, of forced tokens, beats a tree of drawn ones", "legal", "rl"),
    Claim("forced tokens are better kept than masked, where all are forced", "legal", "legal_masked"),
    Claim("tags as rows of the vocabulary beat tags as text, after SFT", "sft", "sft_text"),
    Claim("tags as rows of the vocabulary beat tags as text, after RL by sampling", "sampling", "text"),
    Claim("16 rollouts beat 1", "rl/majority/16", "rl/majority/1"),
    Claim("16 rollouts beat the greedy answer", "rl/majority/16", "rl"),
    Claim("16 rollouts beat the greedy answer of the warm-up, too", "sft/majority/16", "sft"),
    Claim("16 rollouts of a tree beat 16 plain samples", "rl/majority/16", "rl_plain/majority/16"),
    Claim("control: a random reward teaches nothing", "random", "sft", helps=False),
    Claim("control: a reward for form alone teaches nothing", "format_only", "sft", helps=False),
)
"""What the paper says, each against its fair control."""

COUNTS = ("tokens", "verify", "refine")
"""Columns of numbers an answer; the others are per cent of answers, segments or steps."""


class Difference(NamedTuple):
    """Mean gain of one arm over another with its interval, each seed's, and the two-sided p-value of no gain."""

    mean: float
    low: float
    high: float
    seeds: tuple[float, ...]
    p: float

    def verdict(self, helps: bool) -> str:
        if len(self.seeds) == 1:
            return "one seed"
        shown, refuted = (self.low > 0, self.high < 0) if helps else (self.high < SAME, self.low > 0)
        return "supports" if shown else "contradicts" if refuted else "no difference seen" if helps else "not shown"


class Tally(NamedTuple):
    """What an arm did in each of the named problems: how many answers, or steps, were right, of how many."""

    problems: tuple[str, ...]
    right_SP: np.ndarray
    count_SP: np.ndarray

    @property
    def rates(self) -> np.ndarray:
        """Share of right ones in each seed [S]."""
        return self.right_SP.sum(1) / self.count_SP.sum(1)

    @property
    def linear(self) -> np.ndarray:
        """A number for each problem [S, P] whose mean is the seed's share: 1 or 0 where each has one answer; where problems have
        several steps, or none, how far the problem moves the share (the ratio's linear part)."""
        rates_S1, mean_S1 = self.rates[:, None], self.count_SP.mean(1, keepdims=True)
        return rates_S1 + (self.right_SP - rates_S1 * self.count_SP) / mean_S1


def difference(first: Tally, second: Tally) -> Difference:
    """Of two arms' shares, the mean over seeds. Gain = mean + seed + problem + rest, all random; the variance of the
    mean is that of the two-way table without replication, no part below 0, its degrees of freedom are those of Satterthwaite
    (1946). With one seed it is that over problems alone."""
    if first.problems != second.problems:
        raise SystemExit("two arms answered different problems; evaluate both on the same")
    gain_SP = first.linear - second.linear
    seeds, problems = gain_SP.shape
    mean, gain_S1, gain_P = gain_SP.mean(), gain_SP.mean(1, keepdims=True), gain_SP.mean(0)
    rest_SP = gain_SP - gain_S1 - gain_P + mean
    of_problems = seeds * gain_P.var(ddof=1)  # mean squares
    of_seeds = problems * gain_S1.var(ddof=1) if seeds > 1 else 0.0
    of_rest = (rest_SP**2).sum() / max((seeds - 1) * (problems - 1), 1)
    if of_rest < min(of_seeds, of_problems):
        square = of_seeds + of_problems - of_rest
        parts = ((of_seeds, seeds - 1), (of_problems, problems - 1), (of_rest, (seeds - 1) * (problems - 1)))
        freedom = square**2 / sum(part**2 / degrees for part, degrees in parts)
    else:  # seeds, or problems, differ no more than chance has it
        square, freedom = max((of_seeds, seeds - 1), (of_problems, problems - 1))
    error = np.sqrt(square / gain_SP.size)
    half = stats.t.ppf(0.975, freedom) * error
    p = 2 * stats.t.sf(abs(mean) / error, freedom) if error else float(mean == 0)
    return Difference(float(mean), float(mean - half), float(mean + half), tuple(gain_S1[:, 0].tolist()), float(p))


def holm(values: Sequence[float]) -> list[float]:
    """p-values that hold for all of a table's rows together (Holm 1979)."""
    order, adjusted, highest = np.argsort(values), [0.0] * len(values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(values) - rank) * values[place]))
        adjusted[place] = highest
    return adjusted


class Sweep:
    """What the evaluations below a folder answered."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.seeds = sorted(out.glob("seed-*"), key=lambda folder: int(folder.name.removeprefix("seed-")))
        if not self.seeds:
            raise SystemExit(f"{out} holds no seed-*; give the folder of a sweep over seeds")

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

    def answers(self, arm: str) -> Tally:
        """Is the answer right? Columns are problems in the order of their names."""
        problems, right_SP = self._columns(arm, [self._right(seed, *arm.split("/")) for seed in self.seeds])
        return Tally(problems, right_SP, np.ones_like(right_SP))

    def steps(self, arm: str, kind: str, source: ProblemSource) -> Tally:
        """Of a kind of :func:`judged`, how many are good?"""
        rows = [{r.problem.id: judged(r, source)[kind] for r in self.greedy(seed, arm)} for seed in self.seeds]
        problems, pairs_SP2 = self._columns(arm, rows)
        return Tally(problems, pairs_SP2[..., 0], pairs_SP2[..., 1])

    def _columns(self, arm: str, rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[str, ...], np.ndarray]:
        names = sorted(rows[0])
        if any(sorted(row) != names for row in rows):
            raise SystemExit(f"the seeds of {arm} answered different problems")
        return tuple(names), np.array([[row[name] for name in names] for row in rows], dtype=float)

    def _right(self, seed: Path, arm: str, how: str = "greedy", count: str = "1") -> dict[str, bool]:
        if how == "greedy":
            return {r.problem.id: bool(r.score and r.score.verdict.right) for r in self.greedy(seed, arm)}
        found = {}
        for tree in read_trees(self.folder(seed, arm) / "search"):
            winner = vote(tree.rollouts()[: int(count)])
            found[tree.problem.id] = bool(winner and winner.score and winner.score.verdict.right)
        return found

    def majority(self, arm: str) -> dict[str, list[float]]:
        """Accuracy of the majority vote by the number of rollouts, each seed's."""
        found = [json.loads((self.folder(seed, arm) / "results.json").read_text())["rollouts"] for seed in self.seeds]
        return {n: [rows[n]["majority"]["accuracy"] for rows in found] for n in found[0]}

    def greedy(self, seed: Path, arm: str) -> list[Rollout]:
        return [tree.rollouts()[0] for tree in read_trees(self.folder(seed, arm) / "greedy")]


def judged(rollout: Rollout, source: ProblemSource) -> defaultdict[str, tuple[int, int]]:
    """How many are good, of how many, by kind; 0 of 0 for any other. The name of a functional token: steps that the exact checker
    calls right (for which a repetition is wrong), of those that it judges; one that the budget cut is none. ``refine new``:
    refines that are not a step of the attempt that they end. ``attempt new``: attempts, up to a refine or the output, that are
    not an earlier one of the answer."""
    found = defaultdict[str, tuple[int, int]](lambda: (0, 0))

    def count(kind: str, good: bool) -> None:
        right, total = found[kind]
        found[kind] = right + good, total + 1

    attempt: list[str] = []
    earlier: set[tuple[str, ...]] = set()
    scores = source.check_steps(rollout.problem, rollout.steps)
    for (tag, text), score, segment in zip(rollout.steps, scores, rollout.segments, strict=True):
        if not segment.closed:
            break
        if score is not None:
            count(tag, score > 0.5)
        words = " ".join(text.split())
        if tag in ("refine", "output") and attempt:
            count("attempt new", tuple(attempt) not in earlier)
            earlier.add(tuple(attempt))
        if tag == "refine":
            count("refine new", words not in attempt)
            attempt = []
        if tag != "verify":
            attempt.append(words)
    return found


def mechanism(rollouts: Sequence[Rollout], source: ProblemSource) -> dict[str, float]:
    """Where an arm's answers stand: is the first attempt chosen better, are more of them mended, are steps right by the domain's
    exact checker, are segments broken? Shares of steps are left out where they are of fewer than :data:`FEW`."""
    used = Counter(tag for rollout in rollouts for tag, _ in rollout.steps)
    right, scored = Counter[str](), Counter[str]()
    for rollout in rollouts:
        for kind, (good, count) in judged(rollout, source).items():
            right[kind] += good
            scored[kind] += count
    name = lambda kind: kind if kind.endswith(" new") else f"{kind} right"  # noqa: E731
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
        "first attempt": (ends + sum(before - after for before, after in pairs if before is not None)) / n,
        "mended": sum(pair == (False, True) for pair in pairs) / n,
        "spoilt": sum(pair == (True, False) for pair in pairs) / n,
        **{name(kind): right[kind] / scored[kind] for kind in sorted(scored) if scored[kind] >= FEW},
    }


def lines(table: Sequence[Sequence[str]]) -> str:
    head, *rows = table
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])


def per_cent(value: float, sign: bool = False) -> str:
    return f"{100 * value:{'+' if sign else ''}.1f}"


def measure(sweep: Sweep, source: ProblemSource) -> dict[str, Any]:
    """Claims, arms and votes as data."""
    known = {p.name.removeprefix("evaluate_") for place in (*sweep.seeds, sweep.out) for p in place.glob("evaluate_*")}
    data: dict[str, Any] = {"claims": [], "arms": {}, "majority": {}}
    for claim in CLAIMS:
        if not (sweep.ran(claim.first) and sweep.ran(claim.second)):
            continue  # an arm of another world, or not run yet
        pair = [
            sweep.steps(arm, claim.steps, source) if claim.steps else sweep.answers(arm)
            for arm in (claim.first, claim.second)
        ]
        few = min(tally.count_SP.sum(1).min() for tally in pair) < FEW
        if claim.steps and (few or min(tally.rates.min() for tally in pair) == 1):
            continue  # too few steps, or none that is not good
        found = difference(*pair)
        data["claims"].append({**claim._asdict(), **found._asdict(), "verdict": found.verdict(claim.helps)})
    for arm in filter(sweep.ran, sorted(known)):
        answers = [sweep.greedy(seed, arm) for seed in sweep.seeds]
        seeds, pooled = [mechanism(seed, source) for seed in answers], mechanism([*chain(*answers)], source)
        tally = sweep.answers(arm)
        right = ["".join("01"[int(x)] for x in right_P) for right_P in tally.right_SP]
        data["arms"][arm] = {"accuracy": tally.rates.tolist(), **pooled, "seeds": seeds, "right": right}
    voted = (arm for arm in sorted(known) if sweep.ran(f"{arm}/majority/1"))
    data["majority"] = {arm: sweep.majority(arm) for arm in voted}
    return data


def tables(data: Mapping[str, Any]) -> str:
    """The same as tables in Markdown."""
    claims = [["claim", "gain", "95 % interval", "by seed", "p, Holm", "verdict"]]
    for claim, p in zip(data["claims"], holm([claim["p"] for claim in data["claims"]]), strict=True):
        mean, low, high, *seeds = (
            per_cent(x, sign=True) for x in (claim["mean"], claim["low"], claim["high"], *claim["seeds"])
        )
        shown = "< 0.001" if p < 0.001 else f"{p:.3f}"
        claims.append([claim["text"], mean, f"[{low}, {high}]", ", ".join(seeds), shown, claim["verdict"]])
    columns = ("tokens", "unfinished", "malformed", "verify", "refine", "first attempt", "mended", "spoilt")
    kinds = ("right", "new")
    arms = [["arm", "accuracy by seed", *columns, *(f"steps {kind}" for kind in kinds)]]
    for arm, found in data["arms"].items():
        steps = [
            ", ".join(
                f"{key.removesuffix(f' {kind}')} {per_cent(value)}"
                for key, value in found.items()
                if key.endswith(f" {kind}")
            )
            for kind in kinds
        ]
        cells = [f"{found[key]:.1f}" if key in COUNTS else per_cent(found[key]) for key in columns]
        arms.append([arm, ", ".join(map(per_cent, found["accuracy"])), *cells, *steps])
    votes = [["majority of n rollouts", *next(iter(data["majority"].values()), ())]]
    for arm, by_n in data["majority"].items():
        votes.append([arm, *(", ".join(map(per_cent, accuracies)) for accuracies in by_n.values())])
    return "\n\n".join(lines(table) for table in (claims, arms, votes) if len(table) > 1) + "\n"


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
    data = measure(Sweep(options.out), getattr(import_module(module), name)())
    text = tables(data)
    if spent := cost(options.out):
        data["cost"] = spent
        shown = (f"{key} {value:.0f}" if isinstance(value, float) else f"{key} {value}" for key, value in spent.items())
        text += f"\n{', '.join(shown)}\n"
    (options.out / "claims.md").write_text(text, encoding="utf-8")
    (options.out / "claims.json").write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
