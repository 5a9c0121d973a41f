"""Builds sympy expressions from checked trees and proves or refutes equality. Text never reaches sympy's parsers."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, TypeVar

import mpmath
import sympy
from sympy import functions as sf

from rftt_lightning.answers.node import Node

T = TypeVar("T")

DIGITS = 50

_CALLS: dict[str, Callable[..., Any]] = {
    "sin": sf.sin, "cos": sf.cos, "tan": sf.tan, "cot": sf.cot, "sec": sf.sec, "csc": sf.csc, "arcsin": sf.asin, "arccos": sf.acos,
    "arctan": sf.atan, "sinh": sf.sinh, "cosh": sf.cosh, "tanh": sf.tanh, "arcsinh": sf.asinh, "arccosh": sf.acosh,
    "arctanh": sf.atanh, "ln": sf.log, "exp": sf.exp, "max": sf.Max, "min": sf.Min, "gcd": sympy.gcd, "lcm": sympy.lcm,
    "sgn": sf.sign, "arccot": sf.acot, "coth": sf.coth,
}  # fmt: skip
_OPS: dict[str, Callable[..., Any]] = {
    "+": lambda *terms: sympy.Add(*terms), "*": lambda a, b: a * b, "/": lambda a, b: a / b, "neg": lambda a: -a,
    "^": lambda a, b: a**b, "root": lambda a, n: _root(a, n), "!": sf.factorial, "!!": sf.factorial2, "binom": sf.binomial, "abs": sf.Abs,
    "floor": sf.floor, "mod": sympy.Mod, "percent": lambda a: a / 100, "ratio": lambda a, b: a / b,
}  # fmt: skip
_INVERSE = (sf.asin, sf.acos, sf.atan, sf.acot)
_CONSTANTS = {"pi": sympy.pi, "e": sympy.E, "i": sympy.I, "oo": sympy.oo}


class Unsupported(ValueError):
    """This tree is no expression for sympy."""


def build(tree: Node, positive: bool) -> Any:
    op, value, children = tree.op, tree.value, tree.args
    if op == "num":
        return sympy.Rational(value)
    if op == "base":
        return sympy.Integer(int(children[0].value, int(value)))
    if op == "sym":
        return _CONSTANTS.get(value) or sympy.Symbol(value, positive=True if positive else None, real=True)
    if op == "matrix" or op == "det":
        matrix = sympy.Matrix([[build(cell, positive) for cell in row.args] for row in children])
        return matrix.det() if op == "det" else matrix
    if op in ("sum", "prod"):
        body, name, low, high = (build(child, positive) for child in children)
        series = sympy.Sum if op == "sum" else sympy.Product
        return series(body, (name, low, high)).doit()
    args = [build(child, positive) for child in children]
    if op == "call" and value == "log":
        return sf.log(args[0]) / sf.log(args[1] if len(args) > 1 else 10)
    if op == "call" and value in ("max", "min") and len(args) == 2 and any(arg.free_symbols for arg in args):
        sign = 1 if value == "max" else -1
        return (args[0] + args[1] + sign * sf.Abs(args[0] - args[1])) / 2
    if op == "call" and value in ("gcd", "lcm") and not all(arg.is_Integer for arg in args):
        raise Unsupported(value)  # sympy would take letters for polynomials
    if op == "^" and args[0] == args[1] == 0:
        return sympy.nan
    if op == "ceil":
        return -sf.floor(-args[0])
    if op == "call" and value in _CALLS:
        return _CALLS[value](*args)
    if op == "call":
        return sympy.Function(value)(*args)
    if op == "unit" and value == "degree":
        return args[0] * sympy.pi / 180
    if op not in _OPS:
        raise Unsupported(op)
    return _OPS[op](*args)


def _root(value: Any, index: Any) -> Any:
    return -((-value) ** (1 / index)) if value.is_negative and index.is_odd else value ** (1 / index)


def equal(left: Node, right: Node) -> bool | None:
    """True if proved, False if refuted, None if neither."""
    real = build(left, False), build(right, False)
    if any(side.has(sympy.zoo, sympy.nan) for side in real):  # 1/0 is no value
        return False
    if real[0] == real[1]:
        return True
    a, b = build(left, True), build(right, True)
    if isinstance(a, sympy.MatrixBase) or isinstance(b, sympy.MatrixBase):
        return _equal_matrices(a, b)
    difference = a - b
    if difference is sympy.nan or difference.has(sympy.zoo, sympy.nan):
        return False
    if _differ_numerically(difference):
        return False
    if left.symbols() | right.symbols() and _differ_at_points(*real):
        return False
    return True if difference == 0 or _is_zero(difference) else None


def _equal_matrices(a: Any, b: Any) -> bool | None:
    if not (isinstance(a, sympy.MatrixBase) and isinstance(b, sympy.MatrixBase)) or a.shape != b.shape:
        return False
    cells = [_is_zero(cell) for cell in a - b]
    return True if all(cells) else None


def _differ_numerically(difference: Any) -> bool:
    """At three points with positive coordinates, to some 20 digits."""
    names = sorted(difference.free_symbols, key=str)
    for seed in range(3):
        draw = random.Random(seed)
        point = {name: sympy.Rational(draw.randrange(1, 4000), 1009) for name in names}
        value = _number(difference.subs(point))
        if value is not None and abs(value) > mpmath.mpf(10) ** (-DIGITS // 2):
            return True
    return False


def _number(expression: Any) -> Any:
    value = expression.evalf(20, maxn=80)  # of a true 0 all digits cancel, and more would be tried up to maxn
    if not value.is_number or value.has(sympy.nan, sympy.zoo, sympy.oo):
        return None
    with mpmath.workdps(DIGITS):
        parts = [mpmath.mpmathify(str(part)) for part in value.as_real_imag() if part.is_Float or part.is_Rational]
        return mpmath.hypot(*parts) if len(parts) == 2 else None


def _differ_at_points(a: Any, b: Any) -> bool:
    """|x| and x agree for positive x: look where coordinates have any sign and both sides are real."""
    names = sorted(a.free_symbols | b.free_symbols, key=str)
    for seed in range(4):
        draw = random.Random(100 + seed)
        point = {name: sympy.Rational(draw.choice((-1, 1)) * draw.randrange(1, 4000), 1009) for name in names}
        values = [side.subs(point).evalf(DIGITS, maxn=400) for side in (a, b)]
        if any(v.has(sympy.zoo, sympy.nan) for v in values) and not all(v.has(sympy.zoo, sympy.nan) for v in values):
            return True  # one has no value here
        if (
            all(value.is_Float or value.is_Rational for value in values)
            and abs(values[0] - values[1]) > sympy.Float(10) ** -25
        ):
            return True
    return False


def _is_zero(difference: Any) -> bool:
    steps: list[Callable[[Any], Any]] = [
        sympy.expand, lambda d: sympy.cancel(sympy.together(d)), sympy.radsimp, lambda d: sympy.expand(d, func=True, trig=True),
        lambda d: sympy.expand_log(sympy.logcombine(d, force=True), force=True), sympy.simplify,
        lambda d: sympy.simplify(d.rewrite(sympy.exp)),
    ]  # fmt: skip
    if difference.has(sf.factorial, sf.binomial):
        steps.insert(0, lambda d: sympy.gammasimp(d.rewrite(sympy.gamma)))
    if difference.has(sympy.I):
        steps.insert(0, lambda d: sympy.expand(d, complex=True))
    for step in steps:
        try:
            if step(difference) == 0:
                return True
        except (sympy.PolynomialError, NotImplementedError, TypeError, AttributeError):
            continue  # one way of several; another may do
    if not difference.free_symbols and (_algebraic_zero(difference) or _zero_angle(difference)):
        return True
    return difference.equals(0) is True


def _zero_angle(difference: Any) -> bool:
    """Sums of inverse functions: an angle near 0 whose tangent is 0 is 0."""
    if not difference.has(*_INVERSE) or abs(difference.evalf(DIGITS, maxn=400)) > sympy.Float(10) ** -20:
        return False
    tangent = sf.tan(difference)
    for _ in range(4):  # one call opens one level of tan(4 atan x)
        tangent = sympy.expand_trig(tangent)
    return sympy.simplify(tangent) == 0


def _algebraic_zero(difference: Any) -> bool:
    try:
        return sympy.minimal_polynomial(difference, polys=True) == sympy.minimal_polynomial(
            sympy.Integer(0), polys=True
        )
    except (sympy.polys.polyerrors.NotAlgebraic, NotImplementedError):
        return False


def proportional(left: Node, right: Node) -> int:
    """Sign of the constant k in left = k * right (numerators alone if the trees are equations' sides); 0 if there is none."""
    a, b = (sympy.expand(sympy.fraction(sympy.together(build(t, True)))[0]) for t in (left, right))
    if a == 0 or b == 0:
        return int(a == b)
    ratio = sympy.simplify(a / b)
    if ratio.free_symbols or not ratio.is_number or ratio.is_zero or _not_times(left, ratio, right):
        return 0
    return 1 if ratio.is_positive else -1


def _not_times(left: Node, ratio: Any, right: Node) -> bool:
    """Positive values may hide a difference: sqrt(x^2) and x. Numerators are compared, so up to their sign only."""
    a, b = (sympy.fraction(sympy.together(build(tree, False)))[0] for tree in (left, right))
    return _differ_at_points(a, ratio * b) and _differ_at_points(a, -ratio * b)


def digits(tree: Node) -> str | None:
    """The value of a real constant to 30 decimal digits."""
    value = build(tree, True).evalf(40, maxn=400)
    return str(value) if value.is_Float or value.is_Rational else None


def real_roots(tree: Node) -> int:
    polynomial = sympy.Poly(sympy.together(build(tree, False)))
    return int(polynomial.sqf_part().count_roots())


class Sympy:
    """Answers the questions of :class:`~rftt_lightning.answers.equal.Prover`. Runs only in a worker, which may be killed."""

    steps = 1_000_000

    def equal(self, left: Node, right: Node) -> bool | None:
        return _tried(equal, left, right)

    def proportional(self, left: Node, right: Node) -> int:
        return _tried(proportional, left, right) or 0

    def digits(self, node: Node) -> str | None:
        return _tried(digits, node)

    def real_roots(self, node: Node) -> int | None:
        return _tried(real_roots, node)


def _tried(question: Callable[..., T], *nodes: Node) -> T | None:
    try:
        return question(*nodes)
    except MemoryError:
        raise
    except Exception:  # noqa: BLE001  whatever sympy raises means "not proved", and the caller says so
        return None
