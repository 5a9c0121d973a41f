"""The table of a sweep's claims: ``python experiments/claims/table.py runs/claims/countdown``.

Arms answered the same problems, so differences are taken problem by problem. The interval (95 %) is that of a bootstrap over
problems and seeds together. A claim is supported, or contradicted, if its interval excludes 0 and the seeds agree in sign.

Shape suffixes: S seeds, P problems.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
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


FEW = 50
"""Steps of a seed; of fewer a share says nothing."""


class Claim(NamedTuple):
    """That the arm ``first`` is better than ``second``; a control must not be (``helps`` False). An arm is the name after
    ``evaluate_``; ``rl/majority/16`` is the majority vote of its search's first 16 rollouts. Better is a greater share of right
    answers, or of right steps, by the domain's exact checker, of the functional token ``steps``."""

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
    Claim("REINFORCE++ beats on-policy rejection sampling", "rl", "rejection"),
    Claim("the tree beats plain sampling", "rl", "sampling"),
    Claim("outcome and process reward beat the outcome alone", "rl", "orm"),
    Claim("the process reward keeps verify's verdicts right", "rl", "orm", steps="verify"),
    Claim("the process reward keeps refine's steps right, and new", "rl", "orm", steps="refine"),
    Claim("the process reward keeps finishing steps right, and new", "rl", "orm", steps="direct_answer"),
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


class Tally(NamedTuple):
    """What an arm did in each problem: how many answers, or steps, were right, of how many."""

    right_SP: np.ndarray
    count_SP: np.ndarray

    def rates(self, problems: np.ndarray | slice = slice(None)) -> np.ndarray:
        """Share of right ones in each seed [S], of these problems."""
        return self.right_SP[:, problems].sum(1) / self.count_SP[:, problems].sum(1)


def difference(first: Tally, second: Tally, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Of two arms' shares, the mean over seeds."""
    rng = np.random.default_rng(seed)
    seeds, problems = first.right_SP.shape
    means = np.empty(draws)
    for i in range(draws):
        some, asked = rng.integers(seeds, size=seeds), rng.integers(problems, size=problems)
        means[i] = (first.rates(asked) - second.rates(asked))[some].mean()
    low, high = np.quantile(means, [0.025, 0.975])
    gains_S = first.rates() - second.rates()
    return Difference(float(gains_S.mean()), float(low), float(high), tuple(gains_S.tolist()))


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

    def answers(self, arm: str) -> Tally:
        """Is the answer right? Columns are problems in the order of their names."""
        right_SP = self._columns(arm, [self._right(seed, *arm.split("/")) for seed in self.seeds])
        return Tally(right_SP, np.ones_like(right_SP))

    def steps(self, arm: str, tag: str, source: ProblemSource) -> Tally:
        """Are steps of this functional token right, by the exact checker? Those that it does not judge do not count."""
        judged = [{r.problem.id: _judged(r, source)[tag] for r in self.greedy(seed, arm)} for seed in self.seeds]
        return Tally(*np.moveaxis(self._columns(arm, judged), -1, 0))

    def _columns(self, arm: str, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
        names = sorted(rows[0])
        if any(sorted(row) != names for row in rows):
            raise SystemExit(f"the seeds of {arm} answered different problems")
        return np.array([[row[name] for name in names] for row in rows], dtype=float)

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


def _judged(rollout: Rollout, source: ProblemSource) -> defaultdict[str, tuple[int, int]]:
    """By functional token: how many steps the exact checker calls right, of how many that it judges, 0 of 0 where there are none."""
    found = defaultdict[str, tuple[int, int]](lambda: (0, 0))
    for (tag, _), score in zip(rollout.steps, source.check_steps(rollout.problem, rollout.steps), strict=True):
        if score is not None:
            right, count = found[tag]
            found[tag] = right + (score > 0.5), count + 1
    return found


def mechanism(rollouts: Sequence[Rollout], source: ProblemSource) -> dict[str, float]:
    """Where an arm's answers stand: is the first attempt chosen better, are more of them mended, are steps right by the domain's
    exact checker, are segments broken?"""
    used = Counter(tag for rollout in rollouts for tag, _ in rollout.steps)
    right, scored = Counter[str](), Counter[str]()
    for rollout in rollouts:
        for tag, (good, count) in _judged(rollout, source).items():
            right[tag] += good
            scored[tag] += count
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
        pair = [
            sweep.steps(arm, claim.steps, source) if claim.steps else sweep.answers(arm)
            for arm in (claim.first, claim.second)
        ]
        if claim.steps and min(tally.count_SP.sum(1).min() for tally in pair) < FEW:
            continue
        found = difference(*pair)
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
        accuracy = sweep.answers(arm).rates().tolist()
        data["arms"][arm] = {"accuracy": accuracy, **means, "seeds": seeds}
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
