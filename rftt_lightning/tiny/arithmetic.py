"""Multi-step arithmetic with unreliable mental arithmetic. A careful step is always right; a quick one often is not.

``( 1 8 + 7 ) * 3 - 4`` is worked out one operation at a time, the leftmost that can be. Numbers are 0..99, digit by digit.
Contents of the segments: clarify the expression · analyze its operations in the order of working · subquestion the next
operation column by column, ``1 8 + 7 : 8 + 7 = 1 5 , 1 + 1 = 2`` · next_step ``1 8 + 7 = 2 5 ; 2 5 * 3 - 4`` (equation; what
is left) · direct_answer the remaining equations · verify the attempt's equations worked out by columns, up to the first wrong
one, and ``ok`` or ``wrong`` · refine the first wrong equation mended, like next_step or, to the end, direct_answer · output the
value. In base documents a quick result forgets its carry or borrow with probability ``SLIP``; columns never do.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rftt_lightning.core.contracts import Problem, Step, UserError
from rftt_lightning.tiny.world import AFTER, Attempt, World, compute

SLIP = 0.6
HIGHEST = 99
_EQUATION = re.compile(r"(\d(?: \d)?) ([-+*]) (\d(?: \d)?) = (\d(?: \d)?)")
_VALUE = re.compile(r"\d(?: \d)?")


class Operation(NamedTuple):
    """``Operation(18, "+", 7)``, and where its left operand stands in the expression."""

    left: int
    sign: str
    right: int
    at: int = 0

    @property
    def value(self) -> int:
        return compute(self.left, self.sign, self.right)

    @property
    def text(self) -> str:
        return f"{spell(self.left)} {self.sign} {spell(self.right)}"

    def equation(self, value: int) -> str:
        return f"{self.text} = {spell(value)}"

    @property
    def carry(self) -> int:
        """What the units hand over to the tens: positive for a carry, -1 for a borrow, 0 also where there are no tens."""
        if self.left < 10 and self.right < 10:
            return 0
        return compute(self.left % 10, self.sign, self.right % 10) // 10 if self.sign != "*" else self._units // 10

    @property
    def _units(self) -> int:
        return min(self.left, self.right) * (max(self.left, self.right) % 10)

    @property
    def forgetful(self) -> int:
        """The result with its carry or borrow forgotten."""
        return self.value - 10 * self.carry

    @property
    def columns(self) -> str:
        """The same by columns: ``1 8 + 7 : 8 + 7 = 1 5 , 1 + 1 = 2``."""
        if self.left < 10 and self.right < 10:
            return f"{self.text} : {self.equation(self.value)}"
        a, b, carry = self.left, self.right, self.carry
        if self.sign == "*":
            few, many = min(a, b), max(a, b)
            units = f"{many % 10} * {few} = {spell(self._units)}"
            tens = [f"{many // 10} * {few}"]
        else:
            top = a % 10 + (10 if self.sign == "-" and carry else 0)
            units = f"{spell(top)} {self.sign} {b % 10} = {spell(compute(top, self.sign, b % 10))}"
            tens = [str(a // 10), *([f"{self.sign} {b // 10}"] if b > 9 or a < 10 else [])]
        hand = [] if not carry else [f"{'-' if carry < 0 else '+'} {abs(carry)}"]
        return f"{self.text} : {units} , {' '.join([*tens, *hand])} = {self.value // 10}"


def spell(number: int) -> str:
    """``25`` is written ``2 5``."""
    return " ".join(str(number))


def write(expression: Sequence[str]) -> str:
    """``["18", "+", "7"]`` is written ``1 8 + 7``."""
    return " ".join(spell(int(token)) if token.isdigit() else token for token in expression)


def next_operation(expression: Sequence[str]) -> Operation:
    """The leftmost operation whose operands are numbers and whose neighbours do not bind tighter."""
    for i in range(1, len(expression) - 1):
        left, sign, right = expression[i - 1 : i + 2]
        after = expression[i + 2] if i + 2 < len(expression) else ""
        if left.isdigit() and right.isdigit() and not (sign in "+-" and after == "*"):
            return Operation(int(left), sign, int(right), i - 1)
    raise ValueError(f"nothing to work out in {' '.join(expression)}")


def substitute(expression: Sequence[str], at: int, value: int) -> tuple[str, ...]:
    """The expression with the operation at ``at`` replaced by a value, without brackets around a lone number."""
    before, after = list(expression[:at]), list(expression[at + 3 :])
    while before and after and before[-1] == "(" and after[0] == ")":
        before, after = before[:-1], after[1:]
    return (*before, str(value), *after)


def value_of(expression: Sequence[str]) -> int | None:
    """The exact value, None if a value on the way leaves 0..99."""
    while len(expression) > 1:
        operation = next_operation(expression)
        if not 0 <= operation.value <= HIGHEST:
            return None
        expression = substitute(expression, operation.at, operation.value)
    return int(expression[0])


@dataclass
class ArithmeticAttempt(Attempt):
    """``history`` holds (expression before, operation, claimed value); what follows a slip is computed
    from the slip."""

    question: tuple[str, ...]
    history: list[tuple[tuple[str, ...], Operation, int]] = field(default_factory=list)

    @property
    def left(self) -> tuple[str, ...]:
        if not self.history:
            return self.question
        before, operation, value = self.history[-1]
        return substitute(before, operation.at, value)

    @property
    def finished(self) -> bool:
        return len(self.left) == 1

    @property
    def stated(self) -> str:
        return spell(int(self.left[0])) if self.finished else ""

    @property
    def first_wrong(self) -> int:
        """Place of the first wrong equation; the number of equations if there is none."""
        wrong = [i for i, (_, operation, value) in enumerate(self.history) if operation.value != value]
        return wrong[0] if wrong else len(self.history)

    def take(self, equation: str) -> bool:
        """Append an equation if it works out the next operation, whatever its result; True if the result is right."""
        match = _EQUATION.fullmatch(equation)
        if not match or self.finished:
            return False
        operation, value = next_operation(self.left), int(match[4].replace(" ", ""))
        if operation.text != equation.partition(" = ")[0]:
            return False
        self.history.append((self.left, operation, value))
        return value == operation.value

    def step(self, text: str) -> bool:
        equation, _, rest = text.partition(" ; ")
        return self.take(equation) and rest == write(self.left)

    def answer(self, text: str) -> bool:
        taken = [self.take(equation) for equation in text.split(" , ")]
        return all(taken) and self.finished

    def refine(self, text: str) -> bool:
        """Mend the first wrong equation; refuses when there is none."""
        if self.first_wrong == len(self.history):
            return False
        del self.history[self.first_wrong :]
        return self.step(text) if " ; " in text else self.answer(text)

    def check(self, text: str) -> bool:
        return text == self.proof()

    def proof(self) -> str:
        """What a verify has to say."""
        checked = self.history[: self.first_wrong + 1]
        verdict = "ok" if self.first_wrong == len(self.history) and self.finished else "wrong"
        return " ; ".join([*(operation.columns for _, operation, _ in checked), verdict])


class Arithmetic(World):
    """Procedural expressions, disjoint splits by a hash of the expression, exact judge, exact step checker.

    Args:
        split: train, validation or test.
        count: problems; start: problems of the same order to leave out first.
        seed: of the order.
        fewest, most: operations of a problem.
        largest: the largest number given.
    """

    name = "arithmetic"

    def __init__(
        self,
        split: str = "train",
        count: int = 1000,
        start: int = 0,
        seed: int = 0,
        fewest: int = 2,
        most: int = 5,
        largest: int = 50,
    ) -> None:
        super().__init__(split, count, start, seed)
        if not 1 <= fewest <= most <= 8 or not 1 <= largest <= HIGHEST:
            raise UserError(
                f"arithmetic needs 1 <= fewest <= most <= 8 and 1 <= largest <= {HIGHEST}; got "
                f"fewest={fewest}, most={most}, largest={largest}"
            )
        self.fewest, self.most, self.largest = fewest, most, largest

    def draw(self, rng: random.Random) -> tuple[str, Problem]:
        count = rng.randint(self.fewest, self.most)
        expression = _expression(rng, count, self.largest)
        text, value = write(expression), value_of(expression)
        name = f"arithmetic/{''.join(expression)}"
        key = " ".join(token for token in expression if token not in "()")  # brackets alone do not make another problem
        return key, Problem(name, text, spell(value or 0), level=str(count), data={"expression": list(expression)})

    def plain_answer(self, text: str) -> str:
        last = text.rpartition("=")[2].strip()
        return last if _VALUE.fullmatch(last) else ""

    def right(self, problem: Problem, answer: str) -> bool:
        return answer == problem.answer

    def attempt(self, problem: Problem) -> ArithmeticAttempt:
        return ArithmeticAttempt(tuple(problem.data["expression"]))


def _expression(rng: random.Random, count: int, largest: int) -> tuple[str, ...]:
    """A random expression of ``count`` operations whose values on the way stay in 0..99."""
    while True:
        expression = _grow(rng, count, largest)
        if value_of(expression) is not None:
            return expression


def _grow(rng: random.Random, count: int, largest: int) -> tuple[str, ...]:
    if not count:
        return (str(rng.randint(1, largest)),)
    sign = rng.choice("+-*")
    split = rng.randrange(count)
    for _ in range(50):
        left, right = (
            _grow(rng, split, largest),
            _grow(rng, count - 1 - split, min(largest, 9) if sign == "*" else largest),
        )
        whole = (*_bracket(left, sign, False), sign, *_bracket(right, sign, True))
        if value_of(whole) is not None:
            break
    return whole


def _bracket(part: tuple[str, ...], sign: str, is_right: bool) -> tuple[str, ...]:
    """Brackets where they are needed, and never else."""
    depth, loosest = 0, ""
    for token in part:
        depth += (token == "(") - (token == ")")
        if depth == 0 and token in ("+", "-", "*"):
            loosest = token if token != "*" else loosest or "*"
    needed = loosest and (
        (sign == "*" and (loosest != "*" or is_right)) or (sign in "+-" and is_right and loosest != "*")
    )
    return ("(", *part, ")") if needed else part


# -- documents from which the base model learns --------------------------------------------------------------------------


def document(
    problem: Problem,
    rng: random.Random,
    checks: float = 0.75,
    mends: float = 0.7,
    whole: float = 0.3,
    slip: float = SLIP,
) -> list[Step]:
    """A solution whose quick results forget a carry or borrow with probability ``slip``, but never so that the rest would
    leave 0..99.

    What to do next is uniformly random among what is legal. A finished attempt is verified with probability ``checks``; one
    found wrong is mended with probability ``mends``, up to three times, with probability ``whole`` together with all that is
    left to do.
    """
    attempt = ArithmeticAttempt(tuple(problem.data["expression"]))
    steps: list[Step] = []
    tag, sure = "question", False
    while True:
        while not attempt.finished:
            tag = rng.choice(AFTER[tag])
            steps.append(Step(tag, _content(attempt, tag, rng, slip, sure)))
            sure = tag == "subquestion"
        if rng.random() >= checks:
            break
        steps.append(Step("verify", attempt.proof()))
        mended = sum(step.tag == "refine" for step in steps)
        if steps[-1].text.endswith("ok") or mended == 3 or rng.random() >= mends:
            break
        del attempt.history[attempt.first_wrong :]
        final = rng.random() < whole
        tag = "refine"
        steps.append(Step(tag, _content(attempt, "direct_answer" if final else "next_step", rng, slip, True)))
    return [*steps, Step("output", attempt.stated)]


def _content(attempt: ArithmeticAttempt, tag: str, rng: random.Random, slip: float, sure: bool) -> str:
    """Text of a segment, taken into the attempt if it computes; ``sure``: its first result was worked out by columns."""
    if tag == "clarify":
        return write(attempt.question)
    if tag == "analyze":
        return _signs(attempt.question)
    if tag == "subquestion":
        return next_operation(attempt.left).columns
    equations = []
    while not attempt.finished and (tag == "direct_answer" or not equations):
        operation = next_operation(attempt.left)
        slips = operation.carry and not (sure and not equations) and rng.random() < slip
        slips = slips and value_of(substitute(attempt.left, operation.at, operation.forgetful)) is not None
        equations.append(operation.equation(operation.forgetful if slips else operation.value))
        attempt.take(equations[-1])
    return " , ".join(equations) if tag == "direct_answer" else f"{equations[0]} ; {write(attempt.left)}"


def _signs(expression: Sequence[str]) -> str:
    """The operations in the order of working: ``+ * -``."""
    signs = []
    while len(expression) > 1:
        operation = next_operation(expression)
        signs.append(operation.sign)
        expression = substitute(expression, operation.at, 0)
    return " ".join(signs)


def chain_of_thought(problem: Problem, rng: random.Random) -> str:
    """All equations, quickly, as the base answers a plain request to solve."""
    return _content(ArithmeticAttempt(tuple(problem.data["expression"])), "direct_answer", rng, SLIP, False)
