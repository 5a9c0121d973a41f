r"""Are two parsed answers the same answer? Conventions (value equality counts) are the methods of :class:`Comparison`.

Order of means: identical normal forms; exact rationals; identities modulo a prime; and only then sympy in a worker.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Protocol

from rftt_lightning.answers.exact import (
    Undecided,
    approximate,
    proportional_polynomials,
    rational,
    same_polynomial,
)
from rftt_lightning.answers.parse import Node, num, sym
from rftt_lightning.answers.regions import FLIPPED, ORDERED, REALS, Region, is_constant, region, same_region
from rftt_lightning.answers.units import measure
from rftt_lightning.answers.words import EMPTY, words

_EQUATION = "="
INTEGERS, NATURALS = sym("\\mathbb Z"), sym("\\mathbb N")
_PARAMETERS = frozenset("kmnlt")
FLOAT_DIGITS = 13
"""A decimal of at least so many significant digits is a printed float, and counts as the endless value that it rounds."""
FINER_DECIMAL, FINEST_DECIMAL = Fraction(1, 1000), Fraction(5, 1000)
"""A decimal gold admits its own precision: any value without finite decimal (1/3, pi) that rounds to its two or more digits. Of a
value with a finite decimal the relative error must be below this, too (with one or two more places; with three or more)."""


class NeedsProof(Exception):
    """The cheap means of this process do not decide: ask a worker."""


class Prover(Protocol):
    """What sympy is asked, in a worker (:class:`rftt_lightning.answers.prover.Sympy`)."""

    steps: int
    """Comparisons of parts that may be made; a product of two long lists has too many for this process."""

    def equal(self, left: Node, right: Node) -> bool | None:
        """True if proved, False if refuted, None if neither."""

    def proportional(self, left: Node, right: Node) -> int:
        """Sign of the constant k in left = k * right; 0 if there is none."""

    def digits(self, node: Node) -> str | None:
        """The value of a real constant to 30 decimal digits."""


class Unproven:
    """The prover of a process that must not be slow."""

    steps = 2000

    def equal(self, left: Node, right: Node) -> bool | None:
        raise NeedsProof

    def proportional(self, left: Node, right: Node) -> int:
        raise NeedsProof

    def digits(self, node: Node) -> str | None:
        raise NeedsProof


class Comparison:
    """One comparison; afterwards ``rule`` names what decided. Raises :class:`NeedsProof` where ``prover`` does."""

    def __init__(self, prover: Prover) -> None:
        self.prover, self.steps = prover, prover.steps
        self.rule = ""

    def equal(self, gold: Node, answer: Node) -> bool:
        if gold == answer:
            return self._by("identical", True)
        self.steps -= 1
        if self.steps < 0:
            raise NeedsProof
        gold, answer = self._families(gold, answer)
        for form, compare in self._forms():
            if {gold.op, answer.op, "reals" if REALS in (gold, answer) else ""} & {*form}:
                return compare(gold, answer)
        return self._expressions(gold, answer)

    def _forms(self) -> list[tuple[tuple[str, ...], Callable[[Node, Node], bool]]]:
        """The first of these forms that either side has decides how to compare."""
        return [
            (("text",), lambda g, a: self._texts(g, a)),
            (("list", "set", "pm", "mp"), self._lists),
            (("where",), self._same_family),
            (("cup", "cap", "minus", "in", "reals", *ORDERED), self._regions),
            ((_EQUATION, "~"), self._equations),
            (("residue",), self._residues),
            (("tuple",), self._tuples),
            (("matrix",), self._matrices),
            (("base",), self._bases),
            (("ratio",), self._ratios),
            (("percent",), self._percents),
            (("unit",), self._units),
        ]

    def _texts(self, gold: Node, answer: Node) -> bool:
        left, right = (
            "" if n.op != "text" else "no solution" if words(n.value) in EMPTY else words(n.value)
            for n in (gold, answer)
        )
        if Node("set") in (gold, answer):
            return self._by("text", "no solution" in (left, right))
        return self._by("text", bool(left) and left == right)

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
            rounded = _rounds_to(gold, right, answer) or _printed_float(answer, left)
            return self._by("rounding" if rounded else "rational", rounded)
        except Undecided:
            pass
        if is_constant(gold) and is_constant(answer) and (_decimal(gold) or _decimal(answer)):
            return self._by("rounding", self._irrational(gold, answer))
        try:
            return self._by("polynomial", same_polynomial(gold, answer))
        except Undecided:
            pass
        return self._prove(gold, answer)

    def _irrational(self, gold: Node, answer: Node) -> bool:
        """A decimal on one side, an irrational number on the other: a rounded gold, or a printed float."""
        rounded, other = (gold, answer) if _decimal(gold) else (answer, gold)
        if _too_large(other) or (rounded is answer and _significant(answer) < FLOAT_DIGITS):
            return False
        if rounded is gold:
            with contextlib.suppress(Undecided, ValueError, OverflowError):
                return _rounds_to(gold, Fraction(approximate(answer)), answer)
        digits = self.prover.digits(other)
        if digits is None:
            return False
        return (
            _rounds_to(gold, Fraction(digits), answer) if rounded is gold else _printed_float(answer, Fraction(digits))
        )

    def _prove(self, gold: Node, answer: Node) -> bool:
        if _too_large(gold) or _too_large(answer):
            return self._by("too large", False)
        proved = self.prover.equal(gold, answer)
        return self._by("unproved" if proved is None else "sympy", proved is True)

    def _percents(self, gold: Node, answer: Node) -> bool:
        """25% equals 25 (sign missing) and 0.25, 1/4 (its value); but a gold 25 without the sign is not 0.25, nor a gold 1/4 0.25%."""
        if gold.op == answer.op:
            return self.equal(gold.args[0], answer.args[0])
        if gold.op == "percent":
            return self.equal(gold.args[0], answer) or self.equal(Node("/", (gold.args[0], num(100))), answer)
        with contextlib.suppress(Undecided):
            if abs(approximate(gold)) < 1:
                return self.equal(gold, Node("/", (answer.args[0], num(100))))
        return self.equal(gold, answer.args[0]) or self.equal(gold, Node("/", (answer.args[0], num(100))))

    def _units(self, gold: Node, answer: Node) -> bool:
        """A missing unit is accepted, a different one is not, a right conversion is."""
        (value, unit), (other, its) = _in_units(gold), _in_units(answer)
        if {unit, its} <= {"", "degree", "rad"} and _has_pi(value) != _has_pi(other):
            sides = [_in_radians(value, unit), _in_radians(other, its)]
            return self.equal(*sides)
        if not unit or not its or unit == its:
            return self.equal(value, other)
        measures = measure(unit), measure(its)
        if {unit, its} == {"degree", "rad"}:
            return self.equal(_in_radians(value, unit), _in_radians(other, its))
        if measures[0].dimensions != measures[1].dimensions:
            return self._by("units", False)
        return self.equal(Node("*", (value, num(measures[0].factor / measures[1].factor))), other)

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

    def _families(self, gold: Node, answer: Node) -> tuple[Node, Node]:
        r"""``\frac{\pi}{4}+k\pi, k\in\mathbb{Z}`` is a family; then the other side's lone integer letter is its parameter, too."""
        sides = [_family(gold), _family(answer)]
        for side, other in ((0, 1), (1, 0)):
            domain = next((n.args[1].args[1] for n in _items(sides[other]) if n.op == "where"), None)
            if domain is not None and not any(n.op == "where" for n in _items(sides[side])):
                names = sides[side].symbols() & _PARAMETERS
                sides[side] = _with_parameter(sides[side], sym(min(names)), domain) if len(names) == 1 else sides[side]
        return sides[0], sides[1]

    def _same_family(self, gold: Node, answer: Node) -> bool:
        """b + a k for all integers k: the steps agree up to sign, the offsets up to a multiple of the step."""
        if gold.op != answer.op or gold.args[1].op != "in" or answer.args[1].op != "in":
            return self._by("family", gold.op == answer.op) and self._in_order(gold.args, answer.args)
        left, right = (_renamed(n.args[0], str(n.args[1].args[0]), "k") for n in (gold, answer))
        if not self.equal(gold.args[1].args[1], answer.args[1].args[1]):
            return self._by("family", False)
        if self.equal(left, right):
            return True
        starts, steps = zip(*(_progression(n, "k") for n in (left, right)), strict=True)
        if gold.args[1].args[1] != INTEGERS or not all(
            self.equal(_at(n, "k", 2), Node("+", (b, a, a)))
            for n, b, a in zip((left, right), starts, steps, strict=True)
        ):
            return self._by("family", False)
        if not self.equal(steps[0], steps[1]) and not self.equal(steps[0], Node("neg", (steps[1],))):
            return self._by("family", False)
        try:
            shift = round((approximate(starts[1]) - approximate(starts[0])) / approximate(steps[0]))
        except (Undecided, ArithmeticError, ValueError):
            return self._by("family", False)
        return self.equal(Node("+", (starts[0], Node("*", (num(shift), steps[0])))), starts[1])

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
        vectors = [n if n.op == "tuple" else _basis_vector(n, len(m.args)) for n, m in ((gold, answer), (answer, gold))]
        if gold.op != answer.op and vectors[0] and vectors[1]:
            return self._in_order(vectors[0].args, vectors[1].args)
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
        return self._by("equation", bool(self._proportional(*differences)))

    def _proportional(self, left: Node, right: Node) -> int:
        try:
            return proportional_polynomials(left, right)
        except Undecided:
            return self.prover.proportional(left, right)

    def _regions(self, gold: Node, answer: Node) -> bool:
        """Inequalities, intervals, unions and memberships compare as sets of reals when both can be read so."""
        regions = region(gold), region(answer)
        if regions[0] and regions[1]:
            with contextlib.suppress(Undecided):
                return self._by("interval", same_region(regions[0], regions[1], self.equal))
        if gold.op == "in" or answer.op == "in":
            inner = [n.args[1] if n.op == "in" else n for n in (gold, answer)]
            return self.equal(*inner)
        if gold.op in ORDERED and answer.op in ORDERED:
            return self._same_inequality(gold, answer)
        if gold.op == answer.op and gold.op in ("cup", "cap"):
            return self._same_members(_flat(gold), _flat(answer))
        pieces = [
            Node("tuple", n.ends, "(["[n.closed[0]] + ")]"[n.closed[1]]) if n and n.op == "piece" else None
            for n in map(_single, regions)
        ]
        if pieces[0] and pieces[1]:  # ends with letters
            return self._tuples(pieces[0], pieces[1])
        return self._by("form", False)

    def _same_inequality(self, gold: Node, answer: Node) -> bool:
        if any(n.op in ORDERED for side in (gold, answer) for n in side.args):
            return self._by("chain", gold.op == answer.op) and self._in_order(gold.args, answer.args)
        sign = self._proportional(_difference(gold), _difference(answer))
        expected = {1: gold.op, -1: FLIPPED[gold.op]}.get(sign) if isinstance(sign, int) else None
        return self._by("inequality", expected == answer.op)


# -- values and their names

_PLAIN = frozenset(["num", "sym", "call", "+", "*", "/", "^", "neg", "root", "!", "binom", "abs", "floor", "ceil"])


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
    if node.op == "/" and all(n.op == "*" and n.args[0] == sym("d") for n in node.args):  # dy/dx
        return True
    if node.op == "*" and node.args[0].op == "^" and node.args[0].args[1] == Node("neg", (num(1),)):  # f^{-1}(x)
        return node.args[0].args[0].value in ("f", "g", "h", "F", "G", "H") and node.args[1].op == "sym"
    if node.op == "*" and _leaves(node)[0] == "m":  # m \angle ABC
        return len(_leaves(node)) > 1 and all(name[:1].isupper() for name in _leaves(node)[1:])
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
        return [member for arg in node.args for member in ([arg] if arg.op == "set" else _members(arg))]
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


def _items(node: Node) -> Sequence[Node]:
    return node.args if node.op in ("list", "set") else (node,)


def _family(node: Node) -> Node:
    """A list that ends in k in Z: its other items with that condition, as far as they have the letter."""
    conditions = [
        n for n in _items(node) if n.op == "in" and n.args[1] in (INTEGERS, NATURALS) and n.args[0].op == "sym"
    ]
    if node.op != "list" or len(conditions) != 1:
        return node
    (condition,) = conditions
    others = tuple(_value(n) for n in node.args if n is not condition)
    if not others or not all(condition.args[0].symbols() <= n.symbols() for n in others):
        return node
    where = tuple(Node("where", (value, condition)) for n in others for value in _members(n))
    return where[0] if len(where) == 1 else Node("list", where)


def _with_parameter(node: Node, name: Node, domain: Node) -> Node:
    where = tuple(
        Node("where", (_value(n), Node("in", (name, domain)))) for item in _items(node) for n in _members(item)
    )
    return where[0] if len(where) == 1 else Node("list", where)


def _renamed(node: Node, name: str, new: str) -> Node:
    return _replaced(node, {name: sym(new)})


def _at(node: Node, name: str, value: int) -> Node:
    return _replaced(node, {name: num(value)})


def _progression(node: Node, name: str) -> tuple[Node, Node]:
    """Start and step of b + a k."""
    start = _at(node, name, 0)
    return start, Node("+", (_at(node, name, 1), Node("neg", (start,))))


def _basis_vector(node: Node, size: int) -> Node | None:
    """2i - j + 5k as (2, -1, 5)."""
    basis = ("i", "j", "k")[:size]
    if not 2 <= size <= 3 or node.op == "tuple" or not node.symbols() & {"j", "k"}:
        return None
    terms = node.args if node.op == "+" else (node,)
    if any(sum(map(_leaves(term).count, basis)) != 1 for term in terms):
        return None
    units = [{name: num(int(name == unit)) for name in ("i", "j", "k")} for unit in basis]
    return Node("tuple", tuple(_replaced(node, unit) for unit in units), "()")


def _leaves(node: Node) -> list[str]:
    return [leaf for arg in node.args for leaf in _leaves(arg)] if node.args else [node.value]


def _replaced(node: Node, values: Mapping[str, Node]) -> Node:
    if node.op == "sym":
        return values.get(node.value, node)
    return Node(node.op, tuple(_replaced(arg, values) for arg in node.args), node.value)


# -- rounding, units, times


def _decimal(node: Node) -> str:
    """The text of a decimal number, 0.25 or -0.25; empty for others."""
    if node.op == "neg" and (inner := _decimal(node.args[0])):
        return "-" + inner
    return node.value if node.op == "num" and "." in node.value and "/" not in node.value else ""


def _places(text: str) -> int:
    return len(text.partition(".")[2])


def _rounds_to(gold: Node, value: Fraction, answer: Node) -> bool:
    """Does ``value`` round to a decimal gold at the gold's own places? A gold like 3.0 is exact."""
    text, own = _decimal(gold), _decimal(answer)
    if not text or Fraction(text).denominator == 1:
        return False
    exact, places = Fraction(text), _places(text)
    near = abs(exact - value) < Fraction(1, 2 * 10**places)
    if not own and not _finite(value, places):
        return near and _significant(gold) > 1
    finer = _places(own) - places if own else 1
    return near and finer > 0 and abs(exact - value) < (FINER_DECIMAL if finer < 3 else FINEST_DECIMAL) * abs(exact)


def _finite(value: Fraction, places: int) -> bool:
    """Has the value a finite decimal of a few more places?"""
    return 10 ** (places + 4) % value.denominator == 0


def _significant(answer: Node) -> int:
    return len(_decimal(answer).replace(".", "").lstrip("-0"))


def _printed_float(answer: Node, value: Fraction) -> bool:
    """Is the answer a decimal of :data:`FLOAT_DIGITS` or more significant digits, right to its last but one place? Where the
    value has a finite decimal, that should have been given."""
    if answer.op == "neg":
        return _printed_float(answer.args[0], -value)
    power = 0
    if answer.op == "*" and answer.args[1].op == "^" and str(answer.args[1].args[0]) == "10":
        try:
            power = int(rational(answer.args[1].args[1]))
        except Undecided:
            return False
        answer = answer.args[0]
    text = _decimal(answer)
    if not text or abs(power) > 400 or _finite(value, 30) or _significant(answer) < FLOAT_DIGITS:
        return False
    return abs(Fraction(text) * Fraction(10) ** power - value) <= Fraction(10) ** (power - _places(text))


def _in_units(node: Node) -> tuple[Node, str]:
    """Value and unit; mixed units of one dimension (2 hours 30 minutes) add up in the first."""
    if node.op == "unit":
        return node.args[0], node.value
    if node.op == "+" and all(arg.op == "unit" for arg in node.args):
        measures = [measure(arg.value) for arg in node.args]
        if len({m.dimensions for m in measures}) == 1:
            factors = [m.factor / measures[0].factor for m in measures]
            terms = [Node("*", (a.args[0], num(f))) for a, f in zip(node.args, factors, strict=True)]
            return Node("+", tuple(terms)), node.args[0].value
    if node.op == "neg":
        value, unit = _in_units(node.args[0])
        return Node("neg", (value,)), unit
    return node, ""


def _in_radians(value: Node, unit: str) -> Node:
    return Node("*", (value, Node("/", (sym("pi"), num(180))))) if unit == "degree" else value


def _has_pi(node: Node) -> bool:
    return node == sym("pi") or any(_has_pi(arg) for arg in node.args)


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


def _single(part: Region | None) -> Region | None:
    """The one piece that this region is, if it is one."""
    while part and part.op != "piece" and len(part.parts) == 1:
        part = part.parts[0]
    return part


def _interval_like(node: Node) -> bool:
    if node.op in ("list", "set"):
        kinds = {arg.op for arg in node.args}
        return node.op == "list" and bool(kinds & {*ORDERED}) and kinds <= {*ORDERED, _EQUATION}
    return node.op in ("cup", "cap", "minus", *ORDERED) or (node.op == "tuple" and node.value in ("(]", "[)"))


def _too_large(node: Node) -> bool:
    """Would evaluating this build an enormous number? (towers, giant factorials and exponents)"""
    if node.op in ("^", "!", "!!", "binom"):
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
                if not last.symbols() and any(arg.op in ("^", "!", "!!", "binom") for arg in last.args):
                    return True
    return any(_too_large(arg) for arg in node.args)
