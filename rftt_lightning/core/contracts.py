"""Records that cross rooms, and the three classes a user may swap by ``class_path``. Read this file first.

The life of a token: a :class:`ProblemSource` gives a :class:`Problem`; search asks a :class:`Backend` with a
:class:`Request` and gets a :class:`Completion` made of :class:`Segment` s; a path of segments is a :class:`Rollout`; a
:class:`Reward` gives it a :class:`Score`; training learns from scored rollouts. Curation turns rollouts of phase 1 into
:class:`Trajectory` records, which SFT learns from.

Token ids are the truth: a segment keeps exactly the ids that the model saw or wrote. Text is for people and judges.
"""

from __future__ import annotations

import dataclasses
import math
from abc import ABC, abstractmethod
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum, StrEnum
from functools import cached_property
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from rftt_lightning.core.tokens import TokenTable

QUESTION = "question"
"""Name of the grammar state before the first segment."""


ALL = 1 << 30
"""Room for as many requests as there are."""


class UserError(Exception):
    """A mistake of the caller's. Its message is ONE line that says what is wrong and how to mend it; the CLI exits 2."""


class Unavailable(UserError):
    """A service that a run needs does not answer any more. Nothing is wrong with the run, which can go on when it is back."""


class Provenance(IntEnum):
    """Who chose a token. Only SAMPLED tokens are on-policy samples; objectives may keep, mask or weight the others."""

    SAMPLED = 0
    ARGMAX = 1  # the policy's favourite functional token, followed in simulation
    UCT = 2  # tree search chose this functional token
    PROMPT = 3  # nobody: the question, and padding


class Finish(StrEnum):
    """Why a backend stopped writing."""

    STOP = "stop"  # the segments that were asked for are closed, a terminal one is, or the turn ended
    LENGTH = "length"  # Request.max_tokens are written
    SEGMENT = "segment"  # one segment reached Sampling.max_segment_tokens and is not closed
    CONTEXT = "context"  # the model has no more positions


class Status(StrEnum):
    """What became of an answer. Every judged response counts in exactly one of these."""

    RIGHT = "right"
    WRONG = "wrong"
    NO_ANSWER = "no_answer"
    UNPARSABLE_GOLD = "unparsable_gold"
    TIMED_OUT = "timed_out"


@dataclass(frozen=True)
class Problem:
    """One question. ``Problem(id="gsm8k/test/0", question="Janet's ducks …", answer="18")``.

    ``answer`` is the gold answer as its benchmark's own parser read it; ``data`` is what the domain's judge needs beyond
    it (JSON types only). ``level`` and ``subject`` are for grouping results.
    """

    id: str
    question: str
    answer: str = ""
    level: str = ""
    subject: str = ""
    data: Mapping[str, Any] = field(default_factory=dict)


class Step(NamedTuple):
    """A segment as people and judges read it: ``Step("next_step", "3 * 7 = 21 ; 12 21")``. No tags inside ``text``."""

    tag: str
    text: str


@dataclass(frozen=True)
class Verdict:
    """A judged response and why: ``Verdict(Status.RIGHT, answer="1/2", gold="0.5", rule="rational")``.

    ``answer`` is what was extracted (None when nothing was), ``forms`` the normal forms that were compared, ``rule``
    names the rule that decided.
    """

    status: Status
    answer: str | None = None
    gold: str | None = None
    rule: str = ""
    forms: tuple[str, str] | None = None

    @property
    def right(self) -> bool:
        return self.status is Status.RIGHT


@dataclass(frozen=True)
class Segment:
    """One functional segment; one node of a tree.

    With functional tokens (phase 2, inference) ``tokens`` is the opening token, the content, and the closing token
    (absent if cut, then ``closed`` is False); with functional prompts (phase 1) it is the content alone.
    ``logprobs`` are log-probabilities (nats, ≤ 0) under the distribution that was really sampled from: grammar mask,
    temperature, top-p and pruning included; for a forced token they are those of the same distribution before
    pruning. ``provenance`` holds :class:`Provenance` values. All three have one length.
    ``priors`` are the policy's probabilities (sum 1) of the legal functional tokens that may follow; empty if the
    segment is terminal or not closed, and in phase 1. Where tags are text only that of the one which follows is known, and what
    follows may be no tag (``""``). ``version`` counts the policy updates before it was written.

    >>> Segment("output", (130, 7, 146), (-0.1, -0.2, 0.0), (0, 0, 0), text="7", closed=True)  # doctest: +ELLIPSIS
    Segment(tag='output', ...)
    """

    tag: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    provenance: tuple[int, ...]
    text: str
    closed: bool
    priors: Mapping[str, float] = field(default_factory=dict)
    version: int = 0

    @property
    def step(self) -> Step:
        return Step(self.tag, self.text)


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. ``Sampling(temperature=0.7, top_p=0.95)``; temperature 0 is greedy.

    ``boundary`` says how the functional token at a boundary is chosen: ``"sample"`` from the policy, or ``"argmax"``.
    Functional tokens less probable than ``min_prior`` are never drawn (the rest is renormalised).
    ``max_segment_tokens`` caps one segment, tags included.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    boundary: str = "sample"
    min_prior: float = 0.0
    max_segment_tokens: int = 512

    def __post_init__(self) -> None:
        if (
            (self.temperature != 0 and not self.temperature >= 1e-4)
            or not 0 < self.top_p <= 1
            or not 0 <= self.min_prior < 1
            or self.max_segment_tokens < 1
        ):
            raise UserError(
                f"sampling out of range: {self}; need temperature 0 or >= 1e-4, 0 < top_p <= 1, 0 <= min_prior < 1, "
                "max_segment_tokens >= 1"
            )
        if self.boundary not in ("sample", "argmax"):
            raise UserError(f"sampling.boundary is {self.boundary!r}; use 'sample' or 'argmax'")


@dataclass(frozen=True)
class Request:
    """What search asks of a backend: continue ``prompt``.

    Free text (phase 1, CoT): ``after`` is None; the completion is one segment with tag ``force`` (a name only, no token
    is written) that ends at the model's end-of-turn token, which is not part of it.
    Functional tokens: ``after`` is the tag of the last closed segment (:data:`QUESTION` at the root). If ``force`` is a
    tag, its opening token is written first with provenance ``forced_as``; else the policy chooses. Generation stops when
    ``segments`` segments have closed (0: no such limit), a terminal segment closes, or ``max_tokens`` are written.
    Equal requests have equal answers: all randomness comes from ``seed`` and the position.
    """

    prompt: tuple[int, ...]
    seed: int
    max_tokens: int
    sampling: Sampling = Sampling()
    after: str | None = None
    force: str | None = None
    forced_as: Provenance = Provenance.UCT
    segments: int = 1


@dataclass(frozen=True)
class Completion:
    """What a backend answers. ``priors`` are those before the first segment (empty in free text).

    ``computed`` counts the token positions that went through the model for it (prefill, padding of it, and decode).
    """

    segments: tuple[Segment, ...]
    priors: Mapping[str, float] = field(default_factory=dict)
    computed: int = 0
    finish: Finish = Finish.STOP


@dataclass
class Usage:
    """Running totals of a backend: what its answers cost.

    ``calls`` of the model (forward passes, or requests to a server), of which ``steps`` decode one token for each of their
    ``rows`` (rows is summed over the steps, so rows / steps is the mean batch); ``reused`` prompt positions were taken from a
    cache. Keys and values of a position take ``position_bytes``, those of all at most ``cache_bytes`` so far, of which those
    kept for reuse may take ``cache_budget`` (all 0 where they are elsewhere). ``seconds`` of work by name: ``model`` forward
    passes, ``choose`` masking and drawing tokens (on a GPU the waiting for both), ``copy`` moving keys and values.
    ``failures`` counts by name what was tried again.
    """

    calls: int = 0
    steps: int = 0
    rows: int = 0
    reused: int = 0
    position_bytes: int = 0
    cache_bytes: int = 0
    cache_budget: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    failures: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Score:
    """A path's worth. ``value`` in [0, 1] is what search backs up; ``rewards`` (one per segment, any sign) are what
    training puts on the last token of each segment; ``steps`` are the step checker's or PRM's scores in [0, 1], None where
    a segment has none."""

    verdict: Verdict
    value: float
    rewards: tuple[float, ...]
    steps: tuple[float | None, ...] = ()


@dataclass(frozen=True)
class Rollout:
    """One select-expand-simulate-backup pass, as the path it ended on.

    ``prompt`` ids and then the segments' ids are exactly what the model saw. ``complete``: the last segment is terminal and
    closed. ``nodes`` are the path's node numbers in its tree, root excluded.
    """

    problem: Problem
    prompt: tuple[int, ...]
    segments: tuple[Segment, ...]
    complete: bool
    nodes: tuple[int, ...] = ()
    score: Score | None = None

    @property
    def steps(self) -> tuple[Step, ...]:
        return tuple(segment.step for segment in self.segments)

    @property
    def length(self) -> int:
        """Response tokens."""
        return sum(len(segment.tokens) for segment in self.segments)

    @property
    def confidence(self) -> float:
        """Geometric mean of the response tokens' probabilities, in [0, 1]; 0 for an incomplete path. Sees no gold answer."""
        if not self.complete:
            return 0.0
        return math.exp(sum(sum(segment.logprobs) for segment in self.segments) / max(self.length, 1))


@dataclass(frozen=True)
class Trajectory:
    """An annotated reasoning path, made by curation, that SFT learns from.

    ``train[i]`` False keeps step i in the context and out of the loss (wrong branches, if so configured). ``kind`` is
    ``"plain"``, or ``"merged"`` (wrong branch, verify, refine, correct branch). ``lineage`` names the nodes of the
    ``correct`` path and of each ``wrong`` one.
    """

    problem: Problem
    steps: tuple[Step, ...]
    train: tuple[bool, ...]
    kind: str
    lineage: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Trajectory:
        steps = tuple(Step(*step) for step in data["steps"])
        return cls(Problem(**data["problem"]), steps, tuple(data["train"]), data["kind"], data["lineage"])


class Message(NamedTuple):
    """One turn of a chat; ``role`` is "system", "user" or "assistant"."""

    role: str
    content: str


class ProblemSource(ABC):
    """A domain: its problems, and who is right about them. Swap by ``class_path`` for a domain of your own."""

    @abstractmethod
    def problems(self) -> Sequence[Problem]:
        """All problems, always in the same order, ids unique. Raises :class:`UserError` on a malformed or empty source."""

    @abstractmethod
    def judge(self, problem: Problem, response: str) -> Verdict:
        """Is a response right? ``response`` is the path rendered with tags (``<output>…</output>`` holds the answer when
        there is one) or plain text (CoT). Never raises on model output."""

    def judge_many(self, items: Sequence[tuple[Problem, str]]) -> list[Verdict]:
        """Verdicts in the order of ``items``; override where a batch is cheaper."""
        return [self.judge(problem, response) for problem, response in items]

    def same(self, answers: Sequence[str]) -> dict[str, str]:
        """For each of these answers to one problem (:attr:`Verdict.answer`), the earliest that says the same, seen without the gold
        answer: a vote counts them as one. Here only the same text does; override where an answer may be written in many ways."""
        return {answer: answer for answer in answers}

    def output(self, answer: str) -> str:
        r"""Text of the ``<output>`` segment that states an extracted answer; maths: ``The answer is \boxed{…}.``"""
        return f"The answer is \\boxed{{{answer}}}."

    def attempted(self, problem: Problem, steps: Sequence[Step]) -> bool:
        """Have these steps come to an answer, so that what follows may mend it? A check of a step on the way there is no repair."""
        return bool(steps) and steps[-1].tag == "direct_answer"

    def check_steps(self, problem: Problem, steps: Sequence[Step]) -> list[float | None]:
        """Exact step scores in [0, 1], None where a step computes nothing. A domain without a checker scores nothing."""
        return [None] * len(steps)


class Reward(ABC):
    """Scores paths. Swap by ``class_path``. ``uses_gold``: does ``Score.value`` hang on the gold answer? Such a reward may steer
    search for training, never at inference; one that may says ``uses_gold = False``."""

    uses_gold: bool = True

    @abstractmethod
    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        """One score per rollout, in order; all verdicts asked of ``source`` in one batch.

        Rewards may hang on all rollouts that are scored together. Search asks for some at a time; training asks again for all of a
        step, on each rank for those of all ranks. A rollout that has a score keeps its verdict, value and steps, and gets new
        rewards."""


class Backend(ABC):
    """A policy that continues token sequences. ``tokens`` is its functional-token table; ``version`` counts its updates;
    ``batch_size`` is how many requests it works on at a time."""

    tokens: TokenTable
    version: int = 0
    batch_size: int = 1

    @cached_property
    def usage(self) -> Usage:
        """What all answers so far have cost."""
        return Usage()

    @abstractmethod
    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Ids of the chat-templated messages, ending where the assistant's turn begins."""

    @abstractmethod
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        """Completions in the order of ``requests``, any number of requests; batching inside is the backend's affair."""

    def stream(self, more: Callable[[int], Sequence[Request]]) -> Iterator[list[tuple[int, Completion]]]:
        """Answers while questions keep coming: ``more(room)`` gives at most ``room`` further requests, the most urgent ones;
        each list that is yielded holds (how manyth request, completion) of those that are ready. New requests come of the
        answers: ends when all are answered and there are no more. Here a batch is answered before the next one is asked for; a
        backend whose requests can join those under way overrides this, and makes :meth:`generate` of it by :func:`collect`."""
        number = 0
        while requests := more(ALL):
            yield list(enumerate(self.generate(requests), number))
            number += len(requests)


def collect(backend: Backend, requests: Sequence[Request]) -> list[Completion]:
    """:meth:`Backend.generate` by way of :meth:`Backend.stream`."""
    waiting = iter(requests)
    found: dict[int, Completion] = {}
    for ready in backend.stream(lambda room: list(islice(waiting, room))):
        found.update(ready)
    return [found[number] for number in range(len(requests))]
