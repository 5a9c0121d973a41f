"""When a decimal stands for another value: a rounded gold, a printed float. Otherwise value equality decides."""

from __future__ import annotations

from fractions import Fraction

from rftt_lightning.answers.exact import Undecided, rational
from rftt_lightning.answers.node import Node

FLOAT_DIGITS = 13
"""A decimal of at least so many significant digits is a printed float, and counts as the endless value that it rounds."""
FINER_DECIMAL, FINEST_DECIMAL = Fraction(1, 1000), Fraction(5, 1000)
"""A decimal gold admits its own precision: any value without finite decimal (1/3, pi) that rounds to its two or more digits. Of a
value with a finite decimal the relative error must be below this, too (with one or two more places; with three or more)."""


def decimal(node: Node) -> str:
    """The text of a decimal number, 0.25 or -0.25; empty for others."""
    if node.op == "neg" and (inner := decimal(node.args[0])):
        return inner[1:] if inner[0] == "-" else "-" + inner
    return node.value if node.op == "num" and "." in node.value and "/" not in node.value else ""


def _places(text: str) -> int:
    return len(text.partition(".")[2])


def rounds_to(gold: Node, value: Fraction, answer: Node) -> bool:
    """Does ``value`` round to a decimal gold at the gold's own places? A gold like 3.0 is exact."""
    text, own = decimal(gold), decimal(answer)
    if not text or Fraction(text).denominator == 1:
        return False
    exact, places = Fraction(text), _places(text)
    near = abs(exact - value) < Fraction(1, 2 * 10**places)
    if not own and not _finite(value, places):
        return near and significant(gold) > 1
    finer = _places(own) - places if own else 1
    return near and finer > 0 and abs(exact - value) < (FINER_DECIMAL if finer < 3 else FINEST_DECIMAL) * abs(exact)


def _finite(value: Fraction, places: int) -> bool:
    """Has the value a finite decimal of a few more places?"""
    return 10 ** (places + 4) % value.denominator == 0


def significant(answer: Node) -> int:
    return len(decimal(answer).replace(".", "").lstrip("-0"))


def printed_float(answer: Node, value: Fraction) -> bool:
    """Is the answer a decimal of :data:`FLOAT_DIGITS` or more significant digits, right to its last but one place? Where the
    value has a finite decimal, that should have been given."""
    if answer.op == "neg":
        return printed_float(answer.args[0], -value)
    power = 0
    if answer.op == "*" and answer.args[1].op == "^" and str(answer.args[1].args[0]) == "10":
        try:
            power = int(rational(answer.args[1].args[1]))
        except Undecided:
            return False
        answer = answer.args[0]
    text = decimal(answer)
    if not text or abs(power) > 400 or _finite(value, 30) or significant(answer) < FLOAT_DIGITS:
        return False
    return abs(Fraction(text) * Fraction(10) ** power - value) <= Fraction(10) ** (power - _places(text))
