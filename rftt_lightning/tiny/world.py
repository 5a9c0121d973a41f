"""What the embedded worlds share: procedural problems in disjoint splits, and a judge that replays the path."""

from __future__ import annotations

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property

from rftt_lightning.core.contracts import Problem, ProblemSource, Status, Step, UserError, Verdict

SPLITS = {"test": 0.1, "validation": 0.1, "train": 0.8}
LONGEST = 4096
"""Characters of a response that are read at most."""
PATIENCE = 50_000
"""Draws without a new problem after which a split counts as exhausted."""

AFTER = {
    "question": ("clarify", "analyze", "subquestion", "next_step", "direct_answer"),
    "clarify": ("analyze", "subquestion", "next_step", "direct_answer"),
    "analyze": ("subquestion", "next_step", "direct_answer"),
    "subquestion": ("next_step", "direct_answer"),
    "next_step": ("next_step", "direct_answer", "subquestion"),
    "refine": ("next_step", "direct_answer", "subquestion"),
}
"""What a base document may do next while its attempt is not finished, each with equal probability."""

_SEGMENT = re.compile(r"<([a-z_]+)>([^<]*)</\1>")


class Attempt(ABC):
    """The current attempt of a path, replayed as the path claims it. Methods take a segment's text, record it, and say
    whether it is right."""

    stated: str
    """What an output has to say of the attempt; "" if there is nothing to say."""
    finished: bool
    """Is nothing left to do?"""

    @abstractmethod
    def step(self, text: str) -> bool:
        """A next_step."""

    @abstractmethod
    def answer(self, text: str) -> bool:
        """A direct_answer: all that remains."""

    @abstractmethod
    def refine(self, text: str) -> bool:
        """Another step from an earlier point, like next_step or, to the end, direct_answer."""

    @abstractmethod
    def check(self, text: str) -> bool:
        """A verify: is what it says of the attempt true?"""


class World(ProblemSource):
    """A procedural domain.

    Args:
        split: train, validation or test.
        count: problems; start: problems of the same order to leave out first.
        seed: of the order.
    """

    name: str

    def __init__(self, split: str, count: int, start: int, seed: int) -> None:
        if split not in SPLITS:
            raise UserError(f"{self.name}.split is {split!r}; use one of {', '.join(SPLITS)}")
        if count < 1 or start < 0:
            raise UserError(f"{self.name} needs count >= 1 and start >= 0; got count={count}, start={start}")
        self.split, self.count, self.start, self.seed = split, count, start, seed

    @abstractmethod
    def draw(self, rng: random.Random) -> tuple[str, Problem]:
        """A random problem of any split, and the key whose hash decides its split: equal for problems that are the same."""

    @abstractmethod
    def attempt(self, problem: Problem) -> Attempt:
        """An attempt in which nothing is done yet."""

    @abstractmethod
    def plain_answer(self, text: str) -> str:
        """What a chain of thought or an output segment answers, "" if nothing."""

    @abstractmethod
    def right(self, problem: Problem, answer: str) -> bool:
        """Is a non-empty answer right?"""

    def problems(self) -> Sequence[Problem]:
        return self._problems

    @cached_property
    def _problems(self) -> list[Problem]:
        rng = random.Random(f"{self.name} {self.seed} {self.split}")
        found: dict[str, Problem] = {}
        misses = 0
        while len(found) < self.start + self.count:
            key, problem = self.draw(rng)
            misses += 1
            if key not in found and split_of(key) == self.split:
                found[key] = problem
                misses = 0
            if misses > PATIENCE:
                raise UserError(
                    f"{self.name} has only about {len(found)} {self.split} problems of this size; lower count or start"
                )
        return list(found.values())[self.start :]

    def judge(self, problem: Problem, response: str) -> Verdict:
        if len(response) > LONGEST:
            return Verdict(Status.NO_ANSWER, gold=problem.answer, rule="longer than any answer")
        steps = [Step(*pair) for pair in _SEGMENT.findall(response)]
        stated = [text for tag, text in steps if tag == "output"]
        if stated or not steps:
            answer = self.plain_answer((stated or [response])[-1].strip())
        else:
            answer = self.plain_answer(self.replay(problem, steps)[0].stated)
        if not answer:
            return Verdict(Status.NO_ANSWER, gold=problem.answer, rule="states nothing")
        right = self.right(problem, answer)
        return Verdict(Status.RIGHT if right else Status.WRONG, answer, problem.answer, f"{self.name} evaluated")

    def output(self, answer: str) -> str:
        return answer

    def attempted(self, problem: Problem, steps: Sequence[Step]) -> bool:
        return super().attempted(problem, steps) or self.replay(problem, steps)[0].finished

    def check_steps(self, problem: Problem, steps: Sequence[Step]) -> list[float | None]:
        return self.replay(problem, steps)[1]

    def replay(self, problem: Problem, steps: Sequence[Step]) -> tuple[Attempt, list[float | None]]:
        """The attempt at the end of a path, and the scores of the steps: 1 right, 0 wrong, None computes nothing."""
        attempt = self.attempt(problem)
        judges = {
            "next_step": attempt.step,
            "direct_answer": attempt.answer,
            "refine": attempt.refine,
            "verify": attempt.check,
            "output": lambda text: text == attempt.stated,
        }
        return attempt, [float(judges[tag](text[:LONGEST])) if tag in judges else None for tag, text in steps]


def split_of(key: str) -> str:
    """The split that a problem belongs to, by a stable hash of its key."""
    share = int.from_bytes(hashlib.blake2b(key.encode(), digest_size=4).digest(), "big") / 2**32
    for split, width in SPLITS.items():
        if share < width:
            return split
        share -= width
    return "train"


def compute(left: int, sign: str, right: int) -> int:
    return left + right if sign == "+" else left - right if sign == "-" else left * right
