"""Regions of the real line: intervals, unions, inequalities and sets of points, compared cell by cell.

All ends of both regions are put in order; they cut the line into points and gaps. Two regions are equal if they hold the
same of these cells, however they are written.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from rftt_lightning.answers.exact import Undecided, approximate, rational
from rftt_lightning.answers.node import Node, num, replaced, sym

ORDERED = ("<", "<=", ">", ">=", "!=")
FLIPPED = {"<": ">", "<=": ">=", ">": "<", ">=": "<=", "!=": "!="}
REALS = sym("\\mathbb R")
_PLUS = sym("oo")
_MINUS = Node("neg", (_PLUS,))
_NEAR = 1e-9
"""Ends whose rough values differ by less (relatively) are asked about exactly."""


@dataclass(frozen=True)
class Region:
    """``piece`` from ``ends[0]`` to ``ends[1]``, or ``op`` (or, and, either, minus) of ``parts``. ``name``: its variable, if named.

    "either" is a list without connective: what all parts share, or if that is nothing, all of them.
    """

    op: str
    parts: tuple[Region, ...] = ()
    ends: tuple[Node, ...] = ()
    closed: tuple[bool, bool] = (False, False)
    names: frozenset[str] = field(default=frozenset(), compare=False)


def region(node: Node) -> Region | None:
    """The region that a tree describes, or None if it is no region of one real variable."""
    if node.op == "tuple" and len(node.args) == 2 and node.value in ("()", "[]", "(]", "[)"):
        return _piece(*node.args, node.value[0] == "[", node.value[-1] == "]")
    if node.op == "set":
        return Region("or", tuple(_piece(arg, arg, True, True) for arg in node.args))
    if node == REALS:
        return _piece(_MINUS, _PLUS, False, False)
    if node.op == "in":
        inner = region(node.args[1])
        return inner and Region("or", (inner,), names=node.args[0].symbols())
    if node.op in ("cup", "cap", "minus", "list") or (
        node.op == "+" and len(node.args) == 2 and node.args[1].op == "neg"
    ):
        return _combined(node)
    if node.op == "=" and node.args[0].op == "sym" and is_constant(node.args[1]):
        return Region("or", (_piece(node.args[1], node.args[1], True, True),), names=node.args[0].symbols())
    if node.op == "!=" and node.args[1].op == "pm":
        (end,) = node.args[1].args
        return _all_of([_inequality(Node("!=", (node.args[0], point))) for point in (end, Node("neg", (end,)))])
    return _inequality(node) if node.op in ORDERED else None


def same_region(gold: Region, answer: Region, equal: Callable[[Node, Node], bool]) -> bool:
    """Raises :class:`Undecided` when the ends have no rough values (then only the written form can be compared)."""
    if _names(gold) and _names(answer) and _names(gold) != _names(answer):
        return False
    ends = [*_ends(gold), *_ends(answer)]
    line: list[tuple[float, list[Node]]] = []
    for value, end in sorted(((approximate(end), end) for end in ends), key=lambda pair: pair[0]):
        if math.isnan(value):
            raise Undecided("end")
        if math.isinf(value):
            continue
        if line and abs(value - line[-1][0]) <= _NEAR * (1 + abs(value)) and _is_one_of(end, line[-1][1], equal):
            line[-1][1].append(end)
        else:
            line.append((value, [end]))
    order = {id(end): place for place, (_, same) in enumerate(line) for end in same}
    return _cells(gold, order, len(line)) == _cells(answer, order, len(line))


def _is_one_of(end: Node, others: Sequence[Node], equal: Callable[[Node, Node], bool]) -> bool:
    return any(end is other or end == other for other in others) or equal(others[0], end)


def _piece(low: Node, high: Node, low_in: bool, high_in: bool) -> Region:
    return Region("piece", ends=(low, high), closed=(low_in, high_in))


def _combined(node: Node) -> Region | None:
    read = [region(arg.args[0] if node.op == "+" and arg.op == "neg" else arg) for arg in node.args]
    parts = tuple(part for part in read if part)
    if len(parts) < len(read) or not parts:
        return None
    op = {"cup": "or", "cap": "and", "minus": "minus", "+": "minus"}.get(node.op)
    if op is None:
        loose = any(arg.op in (*ORDERED, "in") for arg in node.args)
        op = {"and": "and", "or": "or"}.get(node.value, "either") if loose else "or"
    if node.op == "+" and node.args[0].op == "tuple" and node.args[1].args[0].op != "set":
        return None  # a difference of points
    return Region(op, parts)


def _inequality(node: Node) -> Region | None:
    """Chains, and comparisons that are linear or quadratic in one variable, or linear in an absolute value."""
    left, right = node.args
    if left.op in ORDERED:  # a chain
        return _all_of([_inequality(left), _inequality(Node(node.op, (left.args[1], right)))])
    if left.op != "abs" and right.op == "abs":
        left, right, op = right, left, FLIPPED[node.op]
    else:
        op = node.op
    if left.op == "abs" and is_constant(right):
        (inner,) = left.args
        pair = [_inequality(Node(op, (inner, right))), _inequality(Node(FLIPPED[op], (inner, Node("neg", (right,)))))]
        return _all_of(pair, "and" if op in ("<", "<=", "!=") else "or")
    if is_constant(left):
        left, right, op = right, left, FLIPPED[op]
    if is_constant(left):
        return None
    names = frozenset([str(left)]) if left.op == "call" else left.symbols() | right.symbols()
    if is_constant(right) and _is_variable(left):
        return Region("or", _half_lines(right, op), names=names)
    read = _polynomial(Node("+", (left, Node("neg", (right,)))))
    if read is None and is_constant(right) and (read := _polynomial(left)) and not read[0]:  # 2x < sqrt 3
        _, slope, offset = read
        end = Node("/", (Node("+", (right, num(-offset))), num(slope)))
        return Region("or", _half_lines(end, op if slope > 0 else FLIPPED[op]), names=names)
    return read and Region("or", _where_signed(read, op), names=names)


def _half_lines(end: Node, op: str) -> tuple[Region, ...]:
    above, below = _piece(end, _PLUS, op == ">=", False), _piece(_MINUS, end, False, op == "<=")
    return (above, below) if op == "!=" else (above if op[0] == ">" else below,)


def _where_signed(coefficients: tuple[Fraction, Fraction, Fraction], op: str) -> tuple[Region, ...]:
    """Where a x^2 + b x + c compares with 0 in this way."""
    a, b, c = coefficients
    if not a:
        return _half_lines(num(-c / b), op if b > 0 else FLIPPED[op])
    if a < 0:
        return _where_signed((-a, -b, -c), FLIPPED[op])
    square = b * b - 4 * a * c
    if square < 0:
        return (_piece(_MINUS, _PLUS, False, False),) if op in (">", ">=", "!=") else ()
    spread = Node("/", (Node("root", (num(square), num(2))), num(2 * a)))
    low, high = (Node("+", (num(-b / (2 * a)), end)) for end in (Node("neg", (spread,)), spread))
    outside = (_piece(_MINUS, low, False, op == ">="), _piece(high, _PLUS, op == ">=", False))
    if op == "!=":
        return (outside[0], _piece(low, high, False, False), outside[1])
    return outside if op[0] == ">" else (_piece(low, high, op == "<=", op == "<="),)


def _all_of(read: Sequence[Region | None], op: str = "and") -> Region | None:
    """These regions together; None if one of them is none."""
    parts = tuple(part for part in read if part)
    return Region(op, parts) if len(parts) == len(read) else None


def is_constant(node: Node) -> bool:
    return (
        not node.symbols() and (node.op != "call" or len(node.value) > 1) and all(is_constant(arg) for arg in node.args)
    )


def _is_variable(node: Node) -> bool:
    return node.op == "sym" or (node.op == "call" and len(node.value) == 1)


def _polynomial(node: Node) -> tuple[Fraction, Fraction, Fraction] | None:
    """(a, b, c) if the node is a x^2 + b x + c in one variable, rational and not constant: its values at random points of both
    signs tell (at fixed ones an answer could be made to fit)."""
    names = node.symbols()
    if len(names) != 1:
        return None
    draw = random.SystemRandom()
    points = [Fraction(sign * draw.randrange(1, 10**6), 1009) for sign in (-1, 1, -1, 1, -1, 1)]
    try:
        values = [rational(replaced(node, {next(iter(names)): num(point)})) for point in points]
        (x, y, z, *_), (p, q, r, *_) = points, values
        a = ((r - p) / (z - x) - (q - p) / (y - x)) / (z - y)
        b = (q - p) / (y - x) - a * (x + y)
    except (Undecided, ZeroDivisionError):
        return None
    c = p - a * x * x - b * x
    fits = all(value == a * point * point + b * point + c for point, value in zip(points, values, strict=True))
    return (a, b, c) if fits and (a or b) else None


def _names(part: Region) -> frozenset[str]:
    return part.names.union(*map(_names, part.parts))


def _ends(part: Region) -> Iterator[Node]:
    yield from part.ends
    for inner in part.parts:
        yield from _ends(inner)


def _cells(part: Region, order: dict[int, int], points: int) -> list[bool]:
    """Which of gap, point, gap, …, point, gap the region holds."""
    if part.op == "piece":
        (low, high), (low_in, high_in) = part.ends, part.closed
        first = 2 * order[id(low)] + 2 - low_in if id(low) in order else 0
        last = 2 * order[id(high)] + high_in if id(high) in order else 2 * points
        infinite = [id(end) not in order and approximate(end) for end in part.ends]
        if infinite[0] == math.inf or infinite[1] == -math.inf:
            return [False] * (2 * points + 1)
        return [first <= cell <= last for cell in range(2 * points + 1)]
    parts = [_cells(inner, order, points) for inner in part.parts]
    if part.op == "minus":
        return [bool(row[0] and not any(row[1:])) for row in zip(*parts, strict=True)]
    every = [all(row) for row in zip(*parts, strict=True)]
    if part.op == "and" or (part.op == "either" and any(every)):
        return every
    return [any(row) for row in zip(*parts, strict=True)] if parts else [False] * (2 * points + 1)
