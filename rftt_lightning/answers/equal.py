r"""Are two parsed answers the same answer? Conventions (value equality counts) are the methods of :class:`Comparison`.

Order of means: identical normal forms; exact rationals; identities modulo a prime; and only then sympy in a worker.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Protocol

from rftt_lightning.answers.exact import (
    Undecided,
    approximate,
    proportional_polynomials,
    rational,
    same_polynomial,
    too_large,
)
from rftt_lightning.answers.node import Node, num, replaced, sym
from rftt_lightning.answers.regions import FLIPPED, ORDERED, REALS, Region, is_constant, region, same_region
from rftt_lightning.answers.rounding import FLOAT_DIGITS, decimal, printed_float, rounds_to, significant
from rftt_lightning.answers.units import clock, has_pi, in_radians, in_units, measure, same_time
from rftt_lightning.answers.values import (
    EQUATION,
    INTEGERS,
    PARAMETERS,
    basis_vector,
    family,
    has_sign,
    is_functional,
    items,
    last_meaning,
    members,
    named,
    progression,
    value_of,
    with_parameter,
)
from rftt_lightning.answers.words import EMPTY, words


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

    def real_roots(self, node: Node) -> int | None:
        """How many different real roots a polynomial in one symbol has; None if it is none."""


class Unproven:
    """The prover of a process that must not be slow."""

    steps = 64

    def equal(self, left: Node, right: Node) -> bool | None:
        raise NeedsProof

    def proportional(self, left: Node, right: Node) -> int:
        raise NeedsProof

    def digits(self, node: Node) -> str | None:
        raise NeedsProof

    def real_roots(self, node: Node) -> int | None:
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
            (("text",), self._texts),
            (("where",), self._described),
            (("list", "set", "pm", "mp"), self._lists),
            (("cup", "cap", "minus", "in", "reals", *ORDERED), self._regions),
            ((EQUATION, "~"), self._equations),
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
        if any(has_sign(node) for node in (gold, answer)):
            return self._lists(gold, answer)
        try:
            left, right = rational(gold), rational(answer)
            if left == right:
                return self._by("rational", True)
            rounded = rounds_to(gold, right, answer) or printed_float(answer, left)
            return self._by("rounding" if rounded else "rational", rounded)
        except Undecided:
            pass
        if is_constant(gold) and is_constant(answer) and (decimal(gold) or decimal(answer)):
            return self._by("rounding", self._irrational(gold, answer))
        try:
            return self._by("polynomial", same_polynomial(gold, answer))
        except Undecided:
            pass
        return self._prove(gold, answer)

    def _irrational(self, gold: Node, answer: Node) -> bool:
        """A decimal on one side, an irrational number on the other: a rounded gold, or a printed float."""
        rounded, other = (gold, answer) if decimal(gold) else (answer, gold)
        if too_large(other) or (rounded is answer and significant(answer) < FLOAT_DIGITS):
            return False
        if rounded is gold:
            with contextlib.suppress(Undecided, ValueError, OverflowError):
                return rounds_to(gold, Fraction(approximate(answer)), answer)
        digits = self.prover.digits(other)
        if digits is None:
            return False
        return rounds_to(gold, Fraction(digits), answer) if rounded is gold else printed_float(answer, Fraction(digits))

    def _prove(self, gold: Node, answer: Node) -> bool:
        if too_large(gold) or too_large(answer):
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
        (value, unit), (other, its) = in_units(gold), in_units(answer)
        if {unit, its} <= {"", "degree", "rad"} and has_pi(value) != has_pi(other):
            sides = [in_radians(value, unit), in_radians(other, its)]
            return self.equal(*sides)
        if not unit or not its or unit == its:
            return self.equal(value, other)
        measures = measure(unit), measure(its)
        if {unit, its} == {"degree", "rad"}:
            return self.equal(in_radians(value, unit), in_radians(other, its))
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
        clocks = clock(gold), clock(answer)
        if (gold.value or answer.value) and None not in clocks:
            return self._by("clock", same_time(gold, answer))
        timed = any(re.fullmatch(r"0\d", arg.value) for arg in (*gold.args[1:], *answer.args[1:]))
        if None not in clocks and (timed or (len(gold.args) == 3 and len(answer.args) == 2)):
            return self._by("clock", same_time(gold, answer))
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
        gold, answer = (n.args[1] if n.op == EQUATION and n.args[0].op == "tuple" else n for n in (gold, answer))
        if _interval_like(gold) or _interval_like(answer):
            return self._regions(gold, answer)
        sides = [list(members(node)) for node in (gold, answer)]
        if all(named(n) for side in sides for n in side):
            names = [{str(n.args[0]) for n in side} for side in sides]
            if names[0] == names[1] and len(names[0]) > 1:
                return len(sides[0]) == len(sides[1]) and self._same_members(*sides)
        values = [[value_of(n) for n in side] for side in sides]
        if (gold.op == "tuple") != (answer.op == "tuple") and max(map(len, values)) > 1:
            return self._list_and_tuple(gold, answer)
        return self._same_members(*values)

    def _list_and_tuple(self, gold: Node, answer: Node) -> bool:
        """(2, 3) answers x = 2, y = 3 in that order; it is no set."""
        listed, point = (answer, gold) if gold.op == "tuple" else (gold, answer)
        if listed.op != "list" or not all(named(n) for n in listed.args):
            return self._by("set or tuple", False)
        ordered = [value_of(n) for n in sorted(listed.args, key=lambda n: str(n.args[0]))]
        if not all(n.args[0].op == "sym" for n in listed.args):
            ordered = [value_of(n) for n in listed.args]
        return self._in_order(point.args, ordered) if point is gold else self._in_order(ordered, point.args)

    def _same_members(self, gold: Sequence[Node], answer: Sequence[Node]) -> bool:
        if len(gold) > 64 or len(answer) > 64:
            return self._by("list", False)
        found = [[g == a or ((g.op == "set") == (a.op == "set") and self.equal(g, a)) for a in answer] for g in gold]
        covered = all(any(row) for row in found) and all(any(column) for column in zip(*found, strict=True))
        return self._by("list", covered and bool(gold) == bool(answer))

    def _in_order(self, gold: Sequence[Node], answer: Sequence[Node]) -> bool:
        if len(gold) != len(answer):
            return self._by("length", False)
        return all(self.equal(g, a) for g, a in zip(gold, answer, strict=True))

    def _families(self, gold: Node, answer: Node) -> tuple[Node, Node]:
        r"""``\frac{\pi}{4}+k\pi, k\in\mathbb{Z}`` is a family; then the other side's lone integer letter is its parameter, too."""
        sides = [family(gold), family(answer)]
        for side, other in ((0, 1), (1, 0)):
            domain = next((n.args[1].args[1] for n in items(sides[other]) if n.op == "where"), None)
            if domain is not None and not any(n.op == "where" for n in items(sides[side])):
                names = sides[side].symbols() & PARAMETERS
                sides[side] = with_parameter(sides[side], sym(min(names)), domain) if len(names) == 1 else sides[side]
        return sides[0], sides[1]

    def _described(self, gold: Node, answer: Node) -> bool:
        """{x : x^2 = 4} is the set of its solutions; other descriptions are families."""
        equations = [n for n in (gold, answer) if n.op == "where" and n.args[1].op == EQUATION]
        if len(equations) == 2:
            return self._equations(gold.args[1], answer.args[1])
        if not equations:
            return self._same_family(gold, answer)
        (described,), other = equations, answer if gold in equations else gold
        name, equation = described.args
        solutions = [value_of(n) for n in members(other)]
        if name.op != "sym" or equation.symbols() != name.symbols() or not all(map(is_constant, solutions)):
            return self._by("form", False)
        if named(equation) and is_constant(equation.args[1]):
            return self._same_members([equation.args[1]], solutions)
        found = [replaced(equation, {name.value: solution}) for solution in solutions]
        if self.prover.real_roots(_difference(equation)) != len(solutions) or not all(
            self.equal(*n.args) for n in found
        ):
            return self._by("equation", False)
        return self._by("equation", True)

    def _same_family(self, gold: Node, answer: Node) -> bool:
        """b + a k for all integers k: the steps agree up to sign, the offsets up to a multiple of the step."""
        if gold.value and answer.value and gold.value != answer.value:
            return self._by("family", False)
        if gold.op != answer.op or gold.args[1].op != "in" or answer.args[1].op != "in":
            return self._by("family", gold.op == answer.op) and self._in_order(gold.args, answer.args)
        left, right = (replaced(n.args[0], {str(n.args[1].args[0]): sym("k")}) for n in (gold, answer))
        if not self.equal(gold.args[1].args[1], answer.args[1].args[1]):
            return self._by("family", False)
        if self.equal(left, right):
            return True
        starts, steps = zip(*(progression(n, "k") for n in (left, right)), strict=True)
        lines = [Node("+", (start, Node("*", (step, sym("k"))))) for start, step in zip(starts, steps, strict=True)]
        if gold.args[1].args[1] != INTEGERS or not all(map(self.equal, (left, right), lines)):
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
        vectors = [n if n.op == "tuple" else basis_vector(n, len(m.args)) for n, m in ((gold, answer), (answer, gold))]
        if gold.op != answer.op and vectors[0] and vectors[1]:
            return self._in_order(vectors[0].args, vectors[1].args)
        if gold.op != answer.op:
            return self._by("form", False)
        same_brackets = gold.value == answer.value or {gold.value, answer.value} <= {"()", r"\langle\rangle"}
        return self._in_order(gold.args, answer.args) if same_brackets else self._by("brackets", False)

    def _matrices(self, gold: Node, answer: Node) -> bool:
        if gold.op != answer.op:
            return self._prove(gold, answer)
        if len(gold.args) != len(answer.args):
            return self._by("length", False)
        return all(self._in_order(g.args, a.args) for g, a in zip(gold.args, answer.args, strict=True))

    # -- equations and regions

    def _equations(self, gold: Node, answer: Node) -> bool:
        sides = [last_meaning(node) for node in (gold, answer)]
        if all(named(n) and is_functional(n) for n in sides):
            left, right = (n.args[0] for n in sides)
            if _same_name(left, right) and self.equal(value_of(sides[0]), _in_arguments_of(left, sides[1])):
                return True
            if not any(n.args[1].symbols() for n in sides):
                same = _same_name(left, right) and self.equal(value_of(sides[0]), value_of(sides[1]))
                return self._by("assignment", same)
        if all(n.op == EQUATION for n in sides):
            return self._same_equation(*sides)
        equation, other = sides if sides[0].op == EQUATION else sides[::-1]
        if not named(equation) and equation.symbols():
            return self._by("equation", False)
        value = value_of(equation)
        return self.equal(value, other) if equation is sides[0] else self.equal(other, value)

    def _same_equation(self, left: Node, right: Node) -> bool:
        """Equal up to a non-zero factor: the numerators of both sides' differences are proportional."""
        differences = [_difference(n) for n in (left, right)]
        if any(n.op not in _PLAIN for d in differences for n in d.args):
            return self._in_order(left.args, right.args)
        if any(map(too_large, differences)):
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
        try:
            sign = proportional_polynomials(_difference(gold), _difference(answer))
        except Undecided:  # a factor of unknown sign may be hidden: both sides must be equal
            turned = answer if answer.op == gold.op else Node(FLIPPED[answer.op], answer.args[::-1])
            return self._by("inequality", gold.op == turned.op) and self._in_order(gold.args, turned.args)
        return self._by("inequality", {1: gold.op, -1: FLIPPED[gold.op]}.get(sign) == answer.op)


# -- names and differences

_PLAIN = frozenset(["num", "sym", "call", "+", "*", "/", "^", "neg", "root", "!", "binom", "abs", "floor", "ceil"])


def _same_name(left: Node, right: Node) -> bool:
    """x and x; y and f(x); f(x) and f(t), but not P(A) and P(B)."""
    if left.op == right.op == "call":
        pairs = list(zip(left.args, right.args, strict=False))
        free = all(a == b or (a.op == b.op == "sym" and (a.value + b.value).islower()) for a, b in pairs)
        return left.value == right.value and len(left.args) == len(right.args) and free
    if {left.op, right.op} == {"sym", "call"}:
        name, call = (left, right) if left.op == "sym" else (right, left)
        return name not in call.args
    return left == right


def _in_arguments_of(name: Node, equation: Node) -> Node:
    """The value of f(t) = … with the arguments of f(x)."""
    other = equation.args[0]
    if name.op != "call" or other.op != "call" or name.args == other.args:
        return value_of(equation)
    pairs = [(a.value, b.value) for a, b in zip(name.args, other.args, strict=True)]
    swapped = {b: sym(a) for a, b in pairs} | {a: sym(b) for a, b in pairs if a not in {b for _, b in pairs}}
    return replaced(value_of(equation), swapped)


def _flat(node: Node) -> list[Node]:
    return [leaf for arg in node.args for leaf in (_flat(arg) if arg.op == node.op else [arg])]


def _difference(node: Node) -> Node:
    return Node("+", (node.args[0], Node("neg", (node.args[1],))))


def _single(part: Region | None) -> Region | None:
    """The one piece that this region is, if it is one."""
    while part and part.op != "piece" and len(part.parts) == 1:
        part = part.parts[0]
    return part


def _interval_like(node: Node) -> bool:
    if node.op in ("list", "set"):
        kinds = {arg.op for arg in node.args}
        return node.op == "list" and bool(kinds & {*ORDERED}) and kinds <= {*ORDERED, EQUATION}
    return node.op in ("cup", "cap", "minus", *ORDERED) or (node.op == "tuple" and node.value in ("(]", "[)"))
