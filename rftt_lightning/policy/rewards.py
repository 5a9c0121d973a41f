"""What a path is worth: outcome, process, blend (arXiv 2502.13389, section 3.3); length and format; and controls that must not
raise accuracy. A process reward's step scores come of a :class:`StepScorer`: the domain's exact checker here, PRMs in ``prm``."""

from __future__ import annotations

import hashlib
import math
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

from rftt_lightning.core.contracts import (
    Problem,
    ProblemSource,
    Reward,
    Rollout,
    Score,
    Status,
    Step,
    UserError,
    Verdict,
)
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable

StepPath = tuple[Problem, Sequence[Step]]
"""A problem and the steps taken."""


class StepScorer(ABC):
    """Scores the steps of paths. Swap by ``class_path``. ``uses_gold``: does it know more than a reader of the question?"""

    uses_gold: bool = False

    @abstractmethod
    def score(self, source: ProblemSource | None, paths: Sequence[StepPath]) -> list[tuple[float | None, ...]]:
        """For each path, in order, one score in [0, 1] a step, None where a step has none. ``source`` is the problems' domain,
        which only an exact checker asks."""


class ExactChecker(StepScorer):
    """The domain's own step checker (:meth:`ProblemSource.check_steps`)."""

    uses_gold = True

    def score(self, source: ProblemSource | None, paths: Sequence[StepPath]) -> list[tuple[float | None, ...]]:
        if source is None:
            raise UserError("ExactChecker needs the problems' domain, so it cannot be served; serve a PRM")
        return [tuple(source.check_steps(problem, steps)) for problem, steps in paths]


class OutcomeReward(Reward):
    """Is the answer right? Search backs up 1 or 0; training puts the reward on the last segment, 0 on all others.

    Args:
        right: reward of a right answer.
        wrong: of an answer that is there and wrong (the paper's 0.1).
        none: of a path without an answer, whose budget was spent, or whose verdict timed out (the trainer drops the latter, see
            its ``drop_timed_out``).
        tokens: functional-token table; None is the paper's.
    """

    def __init__(self, right: float = 1.0, wrong: float = 0.1, none: float = 0.0, tokens: str | None = None) -> None:
        self.right, self.wrong, self.none = right, wrong, none
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        return [self._score(r, v) for r, v in zip(rollouts, judge(source, rollouts, self.table), strict=True)]

    def _score(self, rollout: Rollout, verdict: Verdict) -> Score:
        last = {Status.RIGHT: self.right, Status.WRONG: self.wrong}.get(verdict.status, self.none)
        return Score(verdict, float(verdict.right), _on_last(rollout, last))


class Confidence(Reward):
    """For inference: search backs up the policy's own confidence, never the gold answer, which only the verdict knows."""

    uses_gold = False

    def __init__(self, tokens: str | None = None) -> None:
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        verdicts = judge(source, rollouts, self.table)
        return [Score(v, r.confidence, (0.0,) * len(r.segments)) for r, v in zip(rollouts, verdicts, strict=True)]


VALUES: dict[str, Callable[[Sequence[float]], float]] = {
    "mean": lambda steps: sum(steps) / len(steps),
    "min": min,
    "last": lambda steps: steps[-1],
    "product": math.prod,
}
"""What search backs up of a path's step scores, where it is not the outcome (arXiv 2408.03314, section 5.1, compares them)."""


class ProcessReward(Reward):
    """Step scores as a process reward: each scored segment is paid ``weight * (score - center)``.

    Centring matters: positive step scores summed over a path pay for length, and scores that are never positive pay for
    leaving steps (checks, above all) out. A PRM scores every segment, also those that compute nothing: leave them out by
    ``tags``, or they are written for their pay.

    Args:
        weight: of a step's score.
        center: what is taken off a score in [0, 1]; None is the mean score, among the paths scored together, of the segments that
            are the n-th of the same tag in their path, so that a tag's use is neither paid nor punished, only its being right
            (a third attempt is harder than a first; one mean for all of them would teach to give up).
        credit: ``"path"``: scores add up, so that a segment's return holds those of all that follow it (the paper);
            ``"segment"``: a segment's return is its own score, which neither pays for length nor blames a step for later ones.
            The rewards are then differences of neighbouring scores: with gamma 1 their sums telescope.
        scorer: where step scores come from; None is the domain's exact checker.
        tags: functional tokens whose segments are scored; None is all that the scorer scores.
        last_weight: of the score of a path's last segment, where it differs (the released code: 0.4, the others 1); None is
            ``weight``.
        value: what search backs up: ``"outcome"``, 1 or 0 for the answer; or the ``mean``, ``min``, ``last`` or ``product`` of the
            step scores (0 for an incomplete path or one without scores), with which a PRM steers search at inference and
            chooses its answer (``best`` and ``weighted`` of ``rftt evaluate``).
        tokens: functional-token table; None is the paper's.
    """

    def __init__(
        self,
        weight: float = 1.0,
        center: float | None = None,
        credit: str = "path",
        tokens: str | None = None,
        scorer: StepScorer | None = None,
        tags: Sequence[str] | None = None,
        last_weight: float | None = None,
        value: str = "outcome",
    ) -> None:
        if credit not in ("path", "segment"):
            raise UserError(f"reward.credit is {credit!r}; use path or segment")
        if value not in ("outcome", *VALUES):
            raise UserError(f"reward.value is {value!r}; use outcome, {', '.join(VALUES)}")
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)
        for tag in tags or ():
            if tag not in self.table.names:
                raise UserError(
                    f"reward.tags names {tag!r}, which is not among the tokens {', '.join(self.table.names)}"
                )
        self.weight, self.center, self.credit, self.value = weight, center, credit, value
        self.last_weight = weight if last_weight is None else last_weight
        self.scorer, self.tags = scorer or ExactChecker(), None if tags is None else tuple(tags)

    @property
    def uses_gold(self) -> bool:  # type: ignore[override]
        return self.value == "outcome" or self.scorer.uses_gold

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        checked = self._steps(source, rollouts)
        numbered = [turns(rollout) for rollout in rollouts]
        centers = self._centers(numbered, checked)
        scores = []
        verdicts = judge(source, rollouts, self.table)
        for rollout, path, steps, verdict in zip(rollouts, numbered, checked, verdicts, strict=True):
            weights = [self.weight] * (len(steps) - 1) + [self.last_weight]
            triples = zip(weights, path, steps, strict=True)
            rewards = [0.0 if s is None else weight * (s - centers[turn]) for weight, turn, s in triples]
            if self.credit == "segment":
                rewards = [now - later for now, later in zip(rewards, [*rewards[1:], 0.0], strict=True)]
            scores.append(Score(verdict, self._value(rollout, verdict, steps), tuple(rewards), steps))
        return scores

    def _steps(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[tuple[float | None, ...]]:
        """Step scores of the tags that are paid; the scorer is asked for those that are not known."""
        known = [rollout.score.steps if rollout.score else () for rollout in rollouts]
        asked = [i for i, rollout in enumerate(rollouts) if len(known[i]) != len(rollout.segments)]
        given = self.scorer.score(source, [(rollouts[i].problem, rollouts[i].steps) for i in asked])
        for i, steps in zip(asked, given, strict=True):
            pairs = zip(rollouts[i].segments, steps, strict=True)
            known[i] = tuple(s if self.tags is None or segment.tag in self.tags else None for segment, s in pairs)
        return known

    def _value(self, rollout: Rollout, verdict: Verdict, steps: Sequence[float | None]) -> float:
        if self.value == "outcome":
            return float(verdict.right)
        known = [s for s in steps if s is not None]
        return VALUES[self.value](known) if known and rollout.complete else 0.0

    def _centers(
        self, numbered: Sequence[list[tuple[str, int]]], checked: Sequence[tuple[float | None, ...]]
    ) -> dict[tuple[str, int], float]:
        scores: dict[tuple[str, int], list[float]] = defaultdict(list)
        for path, steps in zip(numbered, checked, strict=True):
            for turn, step in zip(path, steps, strict=True):
                if step is not None:
                    scores[turn].append(step)
        return {turn: sum(v) / len(v) if self.center is None else self.center for turn, v in scores.items()}


def turns(rollout: Rollout) -> list[tuple[str, int]]:
    """For each segment, its tag and how many of that tag the path holds before it."""
    before: Counter[str] = Counter()
    numbered = []
    for segment in rollout.segments:
        numbered.append((segment.tag, before[segment.tag]))
        before[segment.tag] += 1
    return numbered


class Blend(Reward):
    """Weighted sum of rewards: an outcome, a process reward and ``others``, which bring weights of their own. Search backs up the
    outcome's value, the verdict is the outcome's. Each answer is judged once.

    The released code has 0.6 and 0.4 on the last segment alone, and each other's score as it is: ``process_weight`` 1, the
    process's ``last_weight`` 0.4 and ``center`` 0, the outcome's ``wrong`` 0.
    """

    def __init__(
        self,
        outcome: Reward,
        process: Reward,
        outcome_weight: float = 0.6,
        process_weight: float = 0.4,
        others: Sequence[Reward] = (),
    ) -> None:
        self.outcome, self.process, self.others = outcome, process, list(others)
        self.outcome_weight, self.process_weight = outcome_weight, process_weight

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        source = _Judged(source)
        bare = [
            replace(r, score=replace(r.score, steps=())) if r.score else r for r in rollouts
        ]  # steps are the process's
        terms = [term.score(source, rollouts) for term in (self.outcome, self.process)]
        terms += [term.score(source, bare) for term in self.others]
        return [self._sum(*scores) for scores in zip(*terms, strict=True)]

    @property
    def uses_gold(self) -> bool:  # type: ignore[override]
        return self.outcome.uses_gold

    def _sum(self, *terms: Score) -> Score:
        weights = (self.outcome_weight, self.process_weight, *[1.0] * len(self.others))
        columns = zip(*(term.rewards for term in terms), strict=True)
        rewards = tuple(sum(w * r for w, r in zip(weights, column, strict=True)) for column in columns)
        return replace(terms[0], rewards=rewards, steps=terms[1].steps)


class LengthReward(Reward):
    """DAPO's soft overlong punishment (arXiv 2503.14476, eq. 13), on the last segment, times ``weight``: 0 for a path of up to
    ``longest - buffer`` response tokens, -1 from ``longest`` on, linear between. Search backs up 1 or 0 for the answer.

    Args:
        longest: response tokens; the expander's ``max_tokens``, say.
        buffer: tokens before that over which the punishment grows.
        weight: of the punishment.
        tokens: functional-token table; None is the paper's.
    """

    def __init__(self, longest: int, buffer: int, weight: float = 1.0, tokens: str | None = None) -> None:
        if not 0 < buffer <= longest:
            raise UserError(f"reward.longest is {longest}, reward.buffer {buffer}; need 0 < buffer <= longest")
        self.longest, self.buffer, self.weight = longest, buffer, weight
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        verdicts = judge(source, rollouts, self.table)
        return [
            Score(v, float(v.right), _on_last(r, self._of(r.length))) for r, v in zip(rollouts, verdicts, strict=True)
        ]

    def _of(self, length: int) -> float:
        over = (length - (self.longest - self.buffer)) / self.buffer
        return -self.weight * min(max(over, 0.0), 1.0)


class FormatReward(Reward):
    """Form alone, no answer: ``well_formed`` on the last segment of a path that is complete, obeys the grammar and has no
    malformed segment; ``malformed`` on each segment that is not closed, says nothing, or spells a tag. Search backs up 1 for a
    well-formed path, else 0. Alone it is a control: nothing in it can raise accuracy but the habit of answering at all.

    Args:
        well_formed: reward of a well-formed path.
        malformed: of a malformed segment.
        tokens: functional-token table; None is the paper's.
    """

    uses_gold = False

    def __init__(self, well_formed: float = 1.0, malformed: float = 0.0, tokens: str | None = None) -> None:
        self.well_formed, self.malformed = well_formed, malformed
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        return [self._score(r, v) for r, v in zip(rollouts, judge(source, rollouts, self.table), strict=True)]

    def _score(self, rollout: Rollout, verdict: Verdict) -> Score:
        bad = [
            not s.closed or not s.text.strip() or any(tag in s.text for tag in self.table.tags)
            for s in rollout.segments
        ]
        well = rollout.complete and not any(bad) and self.table.is_legal(s.tag for s in rollout.segments)
        rewards = [self.malformed if b else 0.0 for b in bad]
        rewards[-1] += self.well_formed if well else 0.0
        return Score(verdict, float(well), tuple(rewards))


class RandomReward(Reward):
    """A control: 1 with probability ``p``, else 0, on the last segment, drawn from the problem and the path's content alone, so
    that the same path is always paid the same (arXiv 2506.10947 saw such a reward raise scores). Search backs it up, too."""

    uses_gold = False

    def __init__(self, p: float = 0.5, seed: int = 0, tokens: str | None = None) -> None:
        self.p, self.seed = _probability(p), seed
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        verdicts = judge(source, rollouts, self.table)
        paid = [float(_draw(self.seed, r.problem.id, *r.steps) < self.p) for r in rollouts]
        return [Score(v, w, _on_last(r, w)) for r, v, w in zip(rollouts, verdicts, paid, strict=True)]


class NoisyReward(Reward):
    """A control: another reward that hears right for wrong, and wrong for right, with probability ``p``, drawn from the problem
    and the response alone. The verdict that is reported stays the true one, so accuracy is what it was."""

    def __init__(self, reward: Reward, p: float = 0.1, seed: int = 0, tokens: str | None = None) -> None:
        self.reward, self.p, self.seed = reward, _probability(p), seed
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)

    @property
    def uses_gold(self) -> bool:  # type: ignore[override]
        return self.reward.uses_gold

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        once = _Judged(source)
        truth = judge(once, rollouts, self.table)
        unscored = [
            replace(rollout, score=None) for rollout in rollouts
        ]  # the other reward is to hear of no true verdict
        scores = self.reward.score(_Judged(once, self._flip), unscored)
        return [replace(score, verdict=verdict) for score, verdict in zip(scores, truth, strict=True)]

    def _flip(self, problem: Problem, response: str, verdict: Verdict) -> Verdict:
        other = {Status.RIGHT: Status.WRONG, Status.WRONG: Status.RIGHT}.get(verdict.status)
        if other is None or _draw(self.seed, problem.id, response) >= self.p:
            return verdict
        return replace(verdict, status=other)


class _Judged(ProblemSource):
    """A domain that is asked about each response once; ``change`` makes another verdict of its own."""

    def __init__(
        self, source: ProblemSource, change: Callable[[Problem, str, Verdict], Verdict] = lambda problem, text, v: v
    ) -> None:
        self.source, self.change = source, change
        self.known: dict[tuple[str, str], Verdict] = {}

    def problems(self) -> Sequence[Problem]:
        return self.source.problems()

    def judge(self, problem: Problem, response: str) -> Verdict:
        return self.judge_many([(problem, response)])[0]

    def judge_many(self, items: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        new = list({(p.id, text): (p, text) for p, text in items if (p.id, text) not in self.known}.values())
        for (problem, text), verdict in zip(new, self.source.judge_many(new), strict=True):
            self.known[problem.id, text] = self.change(problem, text, verdict)
        return [self.known[problem.id, text] for problem, text in items]

    def check_steps(self, problem: Problem, steps: Sequence[Step]) -> list[float | None]:
        return self.source.check_steps(problem, steps)


def _draw(*parts: object) -> float:
    """A number in [0, 1) that depends on the parts alone."""
    digest = hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


def _probability(p: float) -> float:
    if not 0 <= p <= 1:
        raise UserError(f"reward.p is {p}; a probability lies in 0..1")
    return p


def _on_last(rollout: Rollout, reward: float) -> tuple[float, ...]:
    return (*[0.0] * (len(rollout.segments) - 1), reward)


def judge(source: ProblemSource, rollouts: Sequence[Rollout], table: TokenTable) -> list[Verdict]:
    """Verdicts of all paths, those that are not known in one batch; an incomplete path has no answer and is not asked about."""
    asked = [i for i, rollout in enumerate(rollouts) if rollout.complete and not rollout.score]
    given = source.judge_many([(rollouts[i].problem, table.render(rollouts[i].steps)) for i in asked])
    none = Verdict(Status.NO_ANSWER, rule="path is incomplete")
    verdicts = [rollout.score.verdict if rollout.score else none for rollout in rollouts]
    for i, verdict in zip(asked, given, strict=True):
        verdicts[i] = verdict
    return verdicts
