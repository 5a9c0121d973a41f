"""Countdown: reach a target from a few numbers. Checking is cheaper than solving, so verifying and searching can pay.

``3 7 12 target 9`` is solved by ``3 * 7 = 21 , 21 - 12 = 9``: every given number is used once, all values stay within bounds.
Contents of the segments: clarify ``3 7 12 ; 9`` (sorted numbers, target) · analyze ``6 2 3`` (distance of each number from
the target) · subquestion ``combine 3 7`` · next_step ``3 * 7 = 21 ; 12 21`` (equation; what is left) · direct_answer the
remaining equations · verify ``9 , 9 ; ok`` (value, target, verdict) · refine another step from an EARLIER fork of the
attempt, like next_step or, to the end, direct_answer · output the equations of the attempt. A step that brings an attempt to
the end which the path has made before is wrong.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rftt_lightning.core.contracts import Problem, Step, UserError
from rftt_lightning.tiny.world import AFTER, Attempt, World, compute

_EQUATION = re.compile(r"(\d{1,4}) ([-+*]) (\d{1,4}) = (\d{1,4})")


class Move(NamedTuple):
    """``Move(3, "*", 7, 21, (12, 21))``: an equation and the numbers left after it, the new one last."""

    left: int
    sign: str
    right: int
    value: int
    rest: tuple[int, ...]

    @property
    def equation(self) -> str:
        return f"{self.left} {self.sign} {self.right} = {self.value}"

    @property
    def text(self) -> str:
        return f"{self.equation} ; {' '.join(map(str, self.rest))}"


def moves(numbers: Sequence[int], highest: int = 99) -> list[Move]:
    """All legal next equations: two of the numbers, values in 0..highest, the larger number first in a difference."""
    found = set()
    for i, j in itertools.combinations(range(len(numbers)), 2):
        a, b = numbers[i], numbers[j]
        others = sorted(n for k, n in enumerate(numbers) if k not in (i, j))
        for left, sign, right in ((a, "+", b), (max(a, b), "-", min(a, b)), (a, "*", b)):
            value = compute(left, sign, right)
            if 0 <= value <= highest:
                found.add(Move(left, sign, right, value, (*others, value)))
    return sorted(found)


def finals(numbers: Sequence[int], highest: int = 99) -> list[int]:
    """The value at which each complete sequence of moves ends."""
    if len(numbers) == 1:
        return [numbers[0]]
    return [value for move in moves(numbers, highest) for value in finals(move.rest, highest)]


@dataclass
class CountdownAttempt(Attempt):
    """``history`` holds (numbers before, equation, numbers after), as the path claims them; ``made`` the attempts that were
    brought to their end."""

    numbers: tuple[int, ...]
    target: int
    highest: int = 99
    history: list[tuple[tuple[int, ...], str, tuple[int, ...]]] = field(default_factory=list)
    made: set[str] = field(default_factory=set)

    @property
    def left(self) -> tuple[int, ...]:
        return self.history[-1][2] if self.history else self.numbers

    @property
    def finished(self) -> bool:
        return len(self.left) == 1

    @property
    def stated(self) -> str:
        return " , ".join(equation for _, equation, _ in self.history)

    def take(self, equation: str) -> bool:
        """Append an equation; True if it is true and uses numbers that are left."""
        match = _EQUATION.fullmatch(equation)
        if not match:
            return False
        a, sign, b, value = int(match[1]), match[2], int(match[3]), int(match[4])
        before, after = self.left, list(self.left)
        legal = value == compute(a, sign, b) and 0 <= value <= self.highest
        for number in (a, b):
            if number in after:
                after.remove(number)
            else:
                legal = False
        self.history.append((before, equation, (*sorted(after), value)))
        return legal

    def step(self, text: str) -> bool:
        equation, _, rest = text.partition(" ; ")
        return self.take(equation) and rest == " ".join(map(str, self.left)) and self._fresh()

    def refine(self, text: str) -> bool:
        """Go back to the step at which as many numbers were left as this one needs, and take it instead of what was done."""
        equations, _, rest = text.partition(" ; ")
        needed = 1 + (len(rest.split()) if rest else len(equations.split(" , ")))
        for index, (before, old, _) in enumerate(self.history):
            if len(before) == needed:
                del self.history[index:]
                return (self.step(text) and equations != old) if rest else self.answer(text)
        return False

    def answer(self, text: str) -> bool:
        taken = [self.take(equation) for equation in text.split(" , ")]
        return all(taken) and self.finished and self._fresh()

    def _fresh(self) -> bool:
        """Is this an attempt that the path has not made before? Going round in circles is wrong."""
        if not self.finished:
            return True
        fresh = self.stated not in self.made
        self.made.add(self.stated)
        return fresh

    def check(self, text: str) -> bool:
        value = self.left[-1]
        solved = solves(self.numbers, self.target, self.stated, self.highest)
        return text == f"{value} , {self.target} ; {'ok' if solved else 'wrong'}"


def solves(numbers: Sequence[int], target: int, equations: str, highest: int = 99) -> bool:
    """Are the equations true, do they use each number once, and do they end at the target?"""
    attempt = CountdownAttempt(tuple(numbers), target, highest)
    return attempt.answer(equations) and attempt.left == (target,)


class Countdown(World):
    """Procedural problems, disjoint splits by a hash of (sorted numbers, target), exact judge, exact step checker.

    Args:
        split: train, validation or test.
        count: problems; start: problems of the same order to leave out first.
        seed: of the order.
        numbers: how many numbers a problem gives; largest: the largest of them; highest: the largest value on the way.
    """

    name = "countdown"

    def __init__(
        self,
        split: str = "train",
        count: int = 1000,
        start: int = 0,
        seed: int = 0,
        numbers: int = 3,
        largest: int = 20,
        highest: int = 99,
    ) -> None:
        super().__init__(split, count, start, seed)
        if not 2 <= numbers <= 5 or not 1 <= largest <= highest <= 99:
            raise UserError(
                "countdown needs 2 <= numbers <= 5 and 1 <= largest <= highest <= 99; got "
                f"numbers={numbers}, largest={largest}, highest={highest}"
            )
        self.numbers, self.largest, self.highest = numbers, largest, highest

    def draw(self, rng: random.Random) -> tuple[str, Problem]:
        """A problem whose target a random path reaches, so targets that many paths reach are more frequent."""
        numbers = [rng.randint(1, self.largest) for _ in range(self.numbers)]
        target = rng.choice(finals(numbers, self.highest))
        name = f"countdown/{'-'.join(map(str, sorted(numbers)))}={target}"
        question = f"{' '.join(map(str, numbers))} target {target}"
        data = {"numbers": numbers, "target": target}
        return f"{sorted(numbers)} {target}", Problem(name, question, str(target), level=str(self.numbers), data=data)

    def plain_answer(self, text: str) -> str:
        return text if _EQUATION.search(text) else ""

    def right(self, problem: Problem, answer: str) -> bool:
        return solves(problem.data["numbers"], problem.data["target"], answer, self.highest)

    def attempt(self, problem: Problem) -> CountdownAttempt:
        return CountdownAttempt(tuple(problem.data["numbers"]), problem.data["target"], self.highest)


# -- documents from which the base model learns --------------------------------------------------------------------------


def document(
    problem: Problem, rng: random.Random, checks: float = 0.9, mends: float = 0.9, whole: float = 0.3
) -> list[Step]:
    """An aimless solution: uniformly random legal choices, no knowledge of the solution. Every step is correct, but a refine may
    come back to an attempt before the last.

    A finished attempt is verified with probability ``checks``; one found wrong is refined with probability ``mends``, up to
    four times, by a random other move at a random fork, with probability ``whole`` together with all that is left to do.
    """
    numbers, target = tuple(problem.data["numbers"]), problem.data["target"]
    steps: list[Step] = []
    history: list[tuple[tuple[int, ...], Move]] = []
    state, tag, pair = numbers, "question", None
    while True:
        while len(state) > 1 and moves(state):
            tag = rng.choice(AFTER[tag])
            if tag in ("clarify", "analyze"):
                gaps = " ".join(str(abs(target - n)) for n in state)
                steps.append(
                    Step(tag, gaps if tag == "analyze" else f"{' '.join(map(str, sorted(numbers)))} ; {target}")
                )
            elif tag == "subquestion":
                move = rng.choice(moves(state))
                pair = sorted((move.left, move.right))
                steps.append(Step(tag, f"combine {pair[0]} {pair[1]}"))
            else:
                taken = _random_moves(state, rng, pair, 1 if tag == "next_step" else len(state) - 1)
                text = taken[0].text if tag == "next_step" else " , ".join(move.equation for move in taken)
                steps.append(Step(tag, text))
                for move in taken:
                    history.append((state, move))
                    state = move.rest
                pair = None
        solved = state == (target,)
        if rng.random() >= checks:
            break
        steps.append(Step("verify", f"{state[-1]} , {target} ; {'ok' if solved else 'wrong'}"))
        forks = [index for index, (before, _) in enumerate(history) if len(moves(before)) > 1]
        if solved or not forks or sum(step.tag == "refine" for step in steps) == 4 or rng.random() >= mends:
            break
        fork = rng.choice(forks)
        before, old = history[fork]
        move = rng.choice([move for move in moves(before) if move != old])
        history[fork:] = [(before, move)]
        state, tag, text = move.rest, "refine", move.text
        if rng.random() < whole:
            for onward in _random_moves(state, rng, None, len(state) - 1):
                history.append((state, onward))
                state = onward.rest
            text = " , ".join(move.equation for _, move in history[fork:])
        steps.append(Step(tag, text))
    return [*steps, Step("output", " , ".join(move.equation for _, move in history))]


def _random_moves(state: tuple[int, ...], rng: random.Random, pair: list[int] | None, count: int) -> list[Move]:
    """Up to ``count`` random moves, the first of which combines ``pair`` if one was announced."""
    taken: list[Move] = []
    while len(taken) < count and (legal := moves(state)):
        announced = [m for m in legal if pair and not taken and sorted((m.left, m.right)) == pair]
        taken.append(rng.choice(announced or legal))
        state = taken[-1].rest
    return taken


def chain_of_thought(problem: Problem, rng: random.Random) -> str:
    """All equations of a random attempt, as the base answers a plain request to solve."""
    numbers = tuple(problem.data["numbers"])
    return " , ".join(move.equation for move in _random_moves(numbers, rng, None, len(numbers) - 1))
