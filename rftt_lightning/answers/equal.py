r"""Are two parsed answers the same answer? Conventions (value equality counts) are the methods of :class:`Comparison`.

Order of means: identical normal forms; exact rationals; identities modulo a prime; and only then sympy in a worker.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

from rftt_lightning.answers.exact import (
    Undecided,
    approximate,
    rational,
    same_polynomial,
)
from rftt_lightning.answers.parse import UNITS, Node, num, sym
from rftt_lightning.answers.workers import PROVERS, TimedOut

_EQUATION, _ORDERED = "=", ("<", "<=", ">", ">=", "!=")
_FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "!=": "!="}
FLOAT_DIGITS = 12
"""A decimal of at least so many significant digits that is rightly rounded counts as the exact value (printed floats)."""
GOLD_TOLERANCE = Fraction(1, 1000)
"""A decimal gold admits its own precision, but no relative error above this (five times it for a computed value: an expression,
or a decimal of three more places)."""


class Comparison:
    """One comparison with a budget of wall-clock seconds; afterwards ``rule`` names what decided."""

    def __init__(self, seconds: float) -> None:
        self.deadline = time.monotonic() + seconds
        self.rule = ""

    def equal(self, gold: Node, answer: Node) -> bool:
        """Raises :class:`~rftt_lightning.answers.workers.TimedOut` when the budget ends before a decision."""
        if gold == answer:
            return self._by("identical", True)
        if time.monotonic() > self.deadline:
            raise TimedOut("budget spent")
        for form, compare in self._forms():
            if {gold.op, answer.op, "reals" if _REALS in (gold, answer) else ""} & {*form}:
                return compare(gold, answer)
        return self._expressions(gold, answer)

    def _forms(self) -> list[tuple[tuple[str, ...], Callable[[Node, Node], bool]]]:
        """The first of these forms that either side has decides how to compare."""
        return [
            (("text",), lambda g, a: self._by("text", words(g) == words(a))),
            (("list", "set", "pm", "mp"), self._lists),
            (("cup", "cap", "minus", "in", "reals", *_ORDERED), self._regions),
            ((_EQUATION, "~"), self._equations),
            (("residue",), self._residues),
            (("tuple",), self._tuples),
            (("matrix",), self._matrices),
            (("base",), self._bases),
            (("ratio",), self._ratios),
            (("percent",), self._percents),
            (("unit",), self._units),
        ]

    def _by(self, rule: str, decided: bool) -> bool:
        self.rule = rule
        return decided

    # -- numbers and expressions

    def _expressions(self, gold: Node, answer: Node) -> bool:
        if any(_has_sign(node) for node in (gold, answer)):
            return self._lists(gold, answer)
        try:
            left, right = rational(gold), rational(answer)
            if left == right:
                return self._by("rational", True)
            return self._by("rounding", _rounds_to(gold, right, answer) or _printed_float(answer, left))
        except Undecided:
            pass
        try:
            return self._by("polynomial", same_polynomial(gold, answer))
        except Undecided:
            pass
        return self._prove(gold, answer)

    def _prove(self, gold: Node, answer: Node) -> bool:
        if _too_large(gold) or _too_large(answer):
            return self._by("too large", False)
        if "." in gold.value or "." in answer.value:
            text = self._ask("digits", answer if "." in gold.value else gold)
            if text is not None:
                value = Fraction(text)
                return self._by("rounding", _rounds_to(gold, value, answer) or _printed_float(answer, value))
        proved = self._ask("equal", gold, answer)
        return self._by("unproved" if proved is None else "sympy", proved is True)

    def _ask(self, question: str, *nodes: Node) -> Any:
        left = self.deadline - time.monotonic()
        if left <= 0:
            raise TimedOut("budget spent")
        return PROVERS.ask(question, list(nodes), left)

    def _percents(self, gold: Node, answer: Node) -> bool:
        """25% equals 25 (sign missing) and 0.25, 1/4 (its value); but a gold 25 without the sign is not 0.25."""
        if gold.op == answer.op:
            return self.equal(gold.args[0], answer.args[0])
        if gold.op == "percent":
            return self.equal(gold.args[0], answer) or self.equal(Node("/", (gold.args[0], num(100))), answer)
        return self.equal(gold, answer.args[0]) or self.equal(gold, Node("/", (answer.args[0], num(100))))

    def _units(self, gold: Node, answer: Node) -> bool:
        """A missing unit is accepted, a different one is not, a right conversion is."""
        (value, unit), (other, its) = _in_units(gold), _in_units(answer)
        if {unit, its} <= {"", "degrees^1", "degree^1", "radians^1", "rad^1"} and (_has_pi(value) != _has_pi(other)):
            sides = [
                Node("*", (n, Node("/", (sym("pi"), num(180))))) if u[:3] == "deg" else n
                for n, u in ((value, unit), (other, its))
            ]
            return self.equal(*sides)
        if not unit or not its or unit == its:
            return self.equal(value, other)
        factors = [_factor(u) for u in (unit, its)]
        if factors[0] is None or factors[1] is None or factors[0][0] != factors[1][0]:
            return self._by("units", False)
        return self.equal(Node("*", (value, num(factors[0][1]))), Node("*", (other, num(factors[1][1]))))

    def _bases(self, gold: Node, answer: Node) -> bool:
        """A missing base is accepted like a missing unit."""
        if gold.op == answer.op:
            return self._expressions(gold, answer)
        based, plain = (gold, answer) if gold.op == "base" else (answer, gold)
        return self._by("base", plain.op == "num" and plain.value == based.args[0].value)

    def _ratios(self, gold: Node, answer: Node) -> bool:
        if gold.op != "ratio" or answer.op != "ratio":
            ratio, other = (gold, answer) if gold.op == "ratio" else (answer, gold)
            return len(ratio.args) == 2 and self.equal(Node("/", ratio.args), other)
        clocks = _clock(gold), _clock(answer)
        if (gold.value or answer.value) and None not in clocks:
            return self._by("clock", _same_time(gold, answer))
        if len(gold.args) == 3 and len(answer.args) == 2 and None not in clocks:
            return self._by("clock", _same_time(gold, answer))
        if len(gold.args) != len(answer.args):
            return self._by("ratio", False)
        if any(str(arg).strip("0") == "" for arg in (*gold.args, *answer.args)):
            return self._in_order(gold.args, answer.args)
        pairs = zip(gold.args[1:], answer.args[1:], strict=True)
        return all(self.equal(Node("*", (gold.args[0], b)), Node("*", (answer.args[0], a))) for a, b in pairs)

    def _residues(self, gold: Node, answer: Node) -> bool:
        if gold.op == answer.op and self.equal(gold.args[1], answer.args[1]):
            return self.equal(Node("mod", gold.args), Node("mod", answer.args))
        if gold.op == answer.op:
            return self._by("modulus", False)
        left, right = (node.args[0] if node.op == "residue" else node for node in (gold, answer))
        return self.equal(left, right)

    # -- several values

    def _lists(self, gold: Node, answer: Node) -> bool:
        """Order does not matter in sets and bare lists; every value of either side must be among the other's."""
        gold, answer = (n.args[1] if n.op == _EQUATION and n.args[0].op == "tuple" else n for n in (gold, answer))
        if _interval_like(gold) or _interval_like(answer):
            return self._regions(gold, answer)
        named = [list(_members(node)) for node in (gold, answer)]
        if all(n.op == _EQUATION for side in named for n in side) and all(_named(n) for side in named for n in side):
            names = [{str(n.args[0]) for n in side} for side in named]
            if names[0] == names[1] and len(names[0]) > 1:
                return len(named[0]) == len(named[1]) and self._same_members(*named)
        values = [[_value(n) for n in side] for side in named]
        if (gold.op == "tuple") != (answer.op == "tuple") and max(map(len, values)) > 1:
            return self._list_and_tuple(gold, answer, values)
        return self._same_members(*values)

    def _list_and_tuple(self, gold: Node, answer: Node, values: list[list[Node]]) -> bool:
        """(2, 3) answers x = 2, y = 3 in that order; it is no set."""
        listed = answer if gold.op == "tuple" else gold
        if listed.op != "list" or not all(_named(n) for n in listed.args):
            return self._by("set or tuple", False)
        if gold.op == "tuple":
            return self._in_order(gold.args, values[1])
        return self._in_order(values[0], answer.args)

    def _same_members(self, gold: Sequence[Node], answer: Sequence[Node]) -> bool:
        if len(gold) > 64 or len(answer) > 64:
            return self._by("list", False)
        found = [[g == a or self.equal(g, a) for a in answer] for g in gold]
        covered = all(any(row) for row in found) and all(any(column) for column in zip(*found, strict=True))
        return self._by("list", covered and bool(gold) == bool(answer))

    def _in_order(self, gold: Sequence[Node], answer: Sequence[Node]) -> bool:
        if len(gold) != len(answer):
            return self._by("length", False)
        return all(self.equal(g, a) for g, a in zip(gold, answer, strict=True))

    def _tuples(self, gold: Node, answer: Node) -> bool:
        if "matrix" in (gold.op, answer.op):
            vector, matrix = (gold, answer) if gold.op == "tuple" else (answer, gold)
            if all(arg.op == "tuple" for arg in vector.args):
                rows = [Node("tuple", arg.args, "()") for arg in vector.args]
                return self._in_order(*((rows, matrix.args) if gold.op == "tuple" else (matrix.args, rows)))
            if len({len(row.args) for row in matrix.args} - {1}) == 0:
                cells = [row.args[0] for row in matrix.args]
                sides = (vector.args, cells) if gold.op == "tuple" else (cells, vector.args)
                return self._in_order(*sides)
        if gold.op != answer.op:
            return self._by("form", False)
        same_brackets = gold.value == answer.value or {gold.value, answer.value} <= {"()", r"\langle\rangle"}
        return self._in_order(gold.args, answer.args) if same_brackets else self._by("brackets", False)

    def _matrices(self, gold: Node, answer: Node) -> bool:
        if gold.op != answer.op:
            return self._prove(gold, answer)
        rows = zip(gold.args, answer.args, strict=False)
        return self._in_order([sym(str(len(gold.args)))], [sym(str(len(answer.args)))]) and all(
            self._in_order(g.args, a.args) for g, a in rows
        )

    # -- equations and regions

    def _equations(self, gold: Node, answer: Node) -> bool:
        sides = [_last_meaning(node) for node in (gold, answer)]
        if all(_named(n) and _is_functional(n) for n in sides):
            left, right = (n.args[0] for n in sides)
            same = str(left) == str(right) or {left.op, right.op} == {"sym", "call"}
            same = same or (
                left.op == right.op == "call" and len(left.args) == len(right.args) and left.value == right.value
            )
            if same and self.equal(_value(sides[0]), _value(sides[1])):
                return True
            if left.op == "sym" and right.op == "sym" and not (_free(sides[0]) | _free(sides[1])):
                return self._by(
                    "assignment", str(left) == str(right) and self.equal(_value(sides[0]), _value(sides[1]))
                )
        if all(n.op == _EQUATION for n in sides):
            return self._same_equation(*sides)
        equation, other = sides if sides[0].op == _EQUATION else sides[::-1]
        if not _named(equation) and equation.symbols():
            return self._by("equation", False)
        value = _value(equation)
        return self.equal(value, other) if equation is sides[0] else self.equal(other, value)

    def _same_equation(self, left: Node, right: Node) -> bool:
        """Equal up to a non-zero factor: the numerators of both sides' differences are proportional."""
        differences = [_difference(n) for n in (left, right)]
        if any(n.op not in _PLAIN for d in differences for n in d.args):
            return self._in_order(left.args, right.args)
        if any(map(_too_large, differences)):
            return self._by("too large", False)
        return self._by("equation", bool(self._ask("proportional", *differences)))

    def _regions(self, gold: Node, answer: Node) -> bool:
        """Inequalities, intervals, unions and memberships compare as sets of reals when both can be read so."""
        regions = [_region(node) for node in (gold, answer)]
        if regions[0] is not None and regions[1] is not None:
            merged = [_merge(region) for region in regions]
            return self._by("interval", len(merged[0]) == len(merged[1])) and all(
                g[2:] == a[2:] and self.equal(g[0], a[0]) and self.equal(g[1], a[1])
                for g, a in zip(*merged, strict=True)
            )
        if gold.op == "in" or answer.op == "in":
            inner = [n.args[1] if n.op == "in" else n for n in (gold, answer)]
            return self.equal(*inner)
        if gold.op in _ORDERED and answer.op in _ORDERED:
            return self._same_inequality(gold, answer)
        if gold.op == answer.op and gold.op in ("cup", "cap"):
            return self._same_members(_flat(gold), _flat(answer))
        return self._by("form", False)

    def _same_inequality(self, gold: Node, answer: Node) -> bool:
        if any(n.op in _ORDERED for side in (gold, answer) for n in side.args):
            return self._by("chain", gold.op == answer.op) and self._in_order(gold.args, answer.args)
        sign = self._ask("proportional", _difference(gold), _difference(answer))
        expected = {1: gold.op, -1: _FLIPPED[gold.op]}.get(sign) if isinstance(sign, int) else None
        return self._by("inequality", expected == answer.op)


# -- values and their names

_PLAIN = frozenset(["num", "sym", "call", "+", "*", "/", "^", "neg", "root", "!", "binom", "abs", "floor", "ceil"])


def words(node: Node) -> str:
    r"""Text for comparison: case, articles, punctuation and spacing are no difference. ``(B)`` is ``b``."""
    plain = re.sub(r"\\text|[^\w\s]", " ", str(node).lower())
    return " ".join(
        word for word in plain.split() if word not in ("a", "an", "the", "answer", "is") or len(plain.split()) == 1
    )


def _named(node: Node) -> bool:
    """Is the left side a name for the value on the right: x, x_1, f(x), AB, |AB|, P(A), A:B, or a tuple of names?"""
    return node.op == _EQUATION and _is_name(node.args[0])


def _is_name(node: Node) -> bool:
    if node.op == "sym":
        return True
    if node.op == "call":
        return len(node.value) == 1
    if node.op == "tuple":
        return all(_is_name(arg) for arg in node.args)
    if node.op in ("*", "abs", "ratio", "/"):
        return all(_is_geometric(arg) for arg in node.args)
    return False


def _is_geometric(node: Node) -> bool:
    if node.op == "sym":
        return node.value[:1].isupper() or node.value.startswith("\\")
    return node.op in ("*", "abs") and all(_is_geometric(arg) for arg in node.args)


def _is_functional(node: Node) -> bool:
    return node.op == _EQUATION and node.args[0].op in ("sym", "call")


def _free(node: Node) -> frozenset[str]:
    return node.args[1].symbols()


def _value(node: Node) -> Node:
    """What a named equation says: the last link of its chain that is not an approximation."""
    node = _last_meaning(node)
    return node.args[1] if _named(node) else node


def _last_meaning(node: Node) -> Node:
    r"""``x = 8 + 9 = 17`` is x = 17; ``2\sqrt3 \approx 3.46`` is its left side, ``x \approx 11`` is x = 11."""
    if node.op == "~":
        left = _last_meaning(node.args[0])
        return Node(_EQUATION, (left, node.args[1])) if left.op == "sym" else left
    if node.op == _EQUATION and node.args[0].op == _EQUATION:
        first = node.args[0]
        while first.op == _EQUATION:
            first = first.args[0]
        return Node(_EQUATION, (first, node.args[1])) if _is_name(first) else node.args[1]
    if node.op == _EQUATION and not node.symbols() and not _is_name(node.args[0]):
        return node.args[1]
    return node


def _members(node: Node) -> Sequence[Node]:
    """The values of a set, list or ± expression, lists inside lists opened."""
    if node.op in ("list", "set"):
        return [member for arg in node.args for member in _members(arg)]
    if node.op == "in":
        return _members(node.args[1])
    if node.op in (_EQUATION, "~"):
        node = _last_meaning(node)
        values = (
            _members(node.args[1]) if _named(node) and node.args[1].op in ("list", "set") or _has_sign(node) else ()
        )
        if _has_sign(node):
            return [_resolve(node, sign) for sign in (1, -1)]
        return [Node(_EQUATION, (node.args[0], value)) for value in values] or [node]
    return [_resolve(node, sign) for sign in (1, -1)] if _has_sign(node) else [node]


def _has_sign(node: Node) -> bool:
    return node.op in ("pm", "mp") or any(_has_sign(arg) for arg in node.args)


def _resolve(node: Node, sign: int) -> Node:
    if node.op in ("pm", "mp"):
        inner = _resolve(node.args[0], sign)
        return inner if (node.op == "pm") == (sign == 1) else Node("neg", (inner,))
    return Node(node.op, tuple(_resolve(arg, sign) for arg in node.args), node.value)


def _flat(node: Node) -> list[Node]:
    return [leaf for arg in node.args for leaf in (_flat(arg) if arg.op == node.op else [arg])]


def _difference(node: Node) -> Node:
    return Node("+", (node.args[0], Node("neg", (node.args[1],))))


# -- rounding, units, times


def _rounds_to(gold: Node, value: Fraction, answer: Node) -> bool:
    """Does ``value`` round to a decimal gold at the gold's own places? A gold like 3.0 is exact."""
    if gold.op == "neg":
        return answer.op == "neg" and _rounds_to(gold.args[0], -value, answer.args[0])
    if gold.op != "num" or "." not in gold.value or "/" in gold.value:
        return False
    exact, places = Fraction(gold.value), len(gold.value.partition(".")[2])
    finer = _places(answer) - places if answer.op == "num" else 3
    if exact.denominator == 1 or finer < 1:
        return False
    tolerance = GOLD_TOLERANCE * (5 if finer >= 3 else 1) * abs(exact)
    return abs(exact - value) <= min(Fraction(1, 2 * 10**places), tolerance)


def _places(node: Node) -> int:
    return len(node.value.partition(".")[2]) if node.op == "num" else 0


def _printed_float(answer: Node, value: Fraction) -> bool:
    """Is the answer a decimal of :data:`FLOAT_DIGITS` or more significant digits, right to its last but one place?"""
    if answer.op == "neg":
        return _printed_float(answer.args[0], -value)
    power = 0
    if answer.op == "*" and answer.args[1].op == "^" and str(answer.args[1].args[0]) == "10":
        try:
            power = int(rational(answer.args[1].args[1]))
        except Undecided:
            return False
        answer = answer.args[0]
    if answer.op != "num" or "." not in answer.value or abs(power) > 400:
        return False
    significant = len(answer.value.replace(".", "").lstrip("0"))
    unit = Fraction(10) ** (power - _places(answer))
    return significant >= FLOAT_DIGITS and abs(Fraction(answer.value) * Fraction(10) ** power - value) <= unit


def _in_units(node: Node) -> tuple[Node, str]:
    """Value and unit; mixed units of one dimension (2 hours 30 minutes) add up in the first."""
    if node.op == "unit":
        return node.args[0], node.value
    if node.op == "+" and all(arg.op == "unit" for arg in node.args):
        first = _factor(node.args[0].value)
        factors = [_factor(arg.value) for arg in node.args]
        if first and all(f and f[0] == first[0] for f in factors):
            terms = [Node("*", (a.args[0], num(f[1] / first[1]))) for a, f in zip(node.args, factors, strict=True) if f]
            return Node("+", tuple(terms)), node.args[0].value
    if node.op == "neg":
        value, unit = _in_units(node.args[0])
        return Node("neg", (value,)), unit
    return node, ""


def _has_pi(node: Node) -> bool:
    return node == sym("pi") or any(_has_pi(arg) for arg in node.args)


def _factor(unit: str) -> tuple[str, Fraction] | None:
    if "per" in unit and "^" not in unit:
        parts = [UNITS[name] for name in unit.split("per") if name in UNITS]
        if [p[0] for p in parts] == ["length", "time"]:
            return "speed", Fraction(parts[0][1]) / Fraction(parts[1][1])
        return (unit, Fraction(1))
    name, _, power = unit.partition("^")
    if name == "mph":
        return "speed", Fraction("201168/125") / 3600
    dimension, factor = UNITS[name]
    return f"{dimension}^{power}", Fraction(factor) ** int(power)


def _clock(node: Node) -> tuple[int, ...] | None:
    parts = [arg.value for arg in node.args if arg.op == "num" and arg.value.isdigit() and len(arg.value) < 3]
    return tuple(map(int, parts)) if len(parts) == len(node.args) else None


def _same_time(gold: Node, answer: Node) -> bool:
    times = []
    for node in (gold, answer):
        hours, *rest = _clock(node) or (0,)
        hours = hours % 12 + 12 * (node.value == "pm") if node.value else hours
        times.append((hours, [*rest, 0, 0][:2]))
    loose = bool(gold.value) != bool(answer.value) and max(t[0] for t in times) - min(t[0] for t in times) in (0, 12)
    small = all(_clock(n)[0] <= 12 for n in (gold, answer) if not n.value)  # type: ignore[index]
    return times[0][1] == times[1][1] and (times[0][0] == times[1][0] or (loose and small))


# -- regions of the real line: pieces (low, high, low closed, high closed)

Piece = tuple[Node, Node, bool, bool]
_REALS = sym("\\mathbb R")
_MINUS, _PLUS = Node("neg", (sym("oo"),)), sym("oo")


def _interval_like(node: Node) -> bool:
    if node.op in ("list", "set"):
        return node.op == "list" and bool(node.args) and all(arg.op in _ORDERED for arg in node.args)
    return node.op in ("cup", "cap", "minus", *_ORDERED) or (node.op == "tuple" and node.value in ("(]", "[)"))


def _region(node: Node) -> list[Piece] | None:
    """Pieces of the real line, or None if this is no region of one variable."""
    if node.op == "tuple" and len(node.args) == 2:
        return [(*node.args, node.value[0] == "[", node.value[-1] == "]")]
    if node.op == "set":
        return [(arg, arg, True, True) for arg in node.args]
    if node == _REALS:
        return [(_MINUS, _PLUS, False, False)]
    if node.op == "in":
        return _region(node.args[1])
    if node.op in ("cup", "list"):
        parts = [_region(arg) for arg in node.args]
        return None if any(part is None for part in parts) else [piece for part in parts for piece in part or ()]
    if node.op == "minus" and node.args[0] == _REALS and node.args[1].op == "set":
        return _without(list(node.args[1].args))
    return _inequality(node) if node.op in _ORDERED else None


def _without(points: list[Node]) -> list[Piece] | None:
    try:
        points = sorted(points, key=approximate)
    except Undecided:
        return None
    ends = [_MINUS, *points, _PLUS]
    return [(low, high, False, False) for low, high in itertools.pairwise(ends)]


def _inequality(node: Node) -> list[Piece] | None:
    """a < x <= b, and a comparison of c x + d (or |x|, or a name like f(x)) with a constant."""
    left, right = node.args
    if left.op in _ORDERED:  # a chain
        low, middle = left.args
        if left.op[0] != node.op[0] or left.op == "!=" or low.op in _ORDERED or _constant(middle):
            return None
        low, high, first, last = (low, right, left.op, node.op) if node.op[0] == "<" else (right, low, node.op, left.op)
        if not _constant(low) or not _constant(high):
            return None
        if middle.op == "abs":
            pair = [Node("neg", (high,)), Node("neg", (low,))]
            return [(*pair, "=" in last, "=" in first), (low, high, "=" in first, "=" in last)]  # type: ignore[list-item]
        return [(low, high, "=" in first, "=" in last)] if _is_name(middle) else None
    if _constant(left):
        left, right, op = right, left, _FLIPPED[node.op]
    else:
        op = node.op
    if not _constant(right):
        return None
    if left.op == "abs" and _is_name(left.args[0]) and op in ("<", "<="):
        return [(Node("neg", (right,)), right, op == "<=", op == "<=")]
    if left.op == "abs" and _is_name(left.args[0]) and op in (">", ">="):
        return [(_MINUS, Node("neg", (right,)), False, op == ">="), (right, _PLUS, op == ">=", False)]
    slope = _slope(left)
    if slope is None:
        return None
    factor, offset = slope
    end = right if slope == (1, 0) else Node("/", (Node("+", (right, num(-offset))), num(factor)))
    if factor < 0:
        op = _FLIPPED[op]
    if op == "!=":
        return _without([end])
    return [(end, _PLUS, op == ">=", False)] if op[0] == ">" else [(_MINUS, end, False, op == "<=")]


def _constant(node: Node) -> bool:
    return not node.symbols() and node.op not in ("call",) and all(_constant(arg) for arg in node.args)


def _slope(node: Node) -> tuple[Fraction, Fraction] | None:
    """(c, d) if the node is c x + d with one variable x and rational c != 0, d."""
    if _is_name(node):
        return Fraction(1), Fraction(0)
    names = node.symbols()
    if len(names) != 1:
        return None
    try:
        at = [rational(_substitute(node, next(iter(names)), num(value))) for value in (0, 1, 2, 5)]
    except Undecided:
        return None
    slope = at[1] - at[0]
    linear = slope != 0 and at[2] == at[0] + 2 * slope and at[3] == at[0] + 5 * slope
    return (slope, at[0]) if linear else None


def _substitute(node: Node, name: str, value: Node) -> Node:
    if node.op == "sym":
        return value if node.value == name else node
    return Node(node.op, tuple(_substitute(arg, name, value) for arg in node.args), node.value)


def _merge(region: list[Piece] | None) -> list[Piece]:
    """Sorted, with overlapping and touching pieces joined; left as it is where ends cannot be ordered."""
    assert region is not None
    try:
        pieces = sorted(region, key=lambda p: (approximate(p[0]), not p[2], approximate(p[1])))
        merged = pieces[:1]
        for low, high, low_in, high_in in pieces[1:]:
            before = merged[-1]
            gap = approximate(low) - approximate(before[1])
            if gap > 1e-12 or (gap > -1e-12 and not (low_in or before[3])):
                merged.append((low, high, low_in, high_in))
            elif approximate(high) > approximate(before[1]):
                merged[-1] = (before[0], high, before[2], high_in)
            elif approximate(high) == approximate(before[1]):
                merged[-1] = (before[0], before[1], before[2], before[3] or high_in)
        return merged
    except Undecided:
        return region


def _too_large(node: Node) -> bool:
    """Would evaluating this build an enormous number? (towers, giant factorials and exponents)"""
    if node.op in ("^", "!", "binom"):
        last = node.args[-1] if node.op == "^" else node.args[0]
        limit = 20_000 if node.op == "^" else 2_000
        try:
            if abs(rational(last)) > limit:
                return True
        except Undecided:
            try:
                if abs(approximate(last)) > limit:
                    return True
            except Undecided:
                if not last.symbols() and any(arg.op in ("^", "!", "binom") for arg in last.args):
                    return True
    return any(_too_large(arg) for arg in node.args)
