"""Cheap exact arithmetic on parsed answers: rationals under a size budget, identities modulo a prime, rough floats.

Nothing here can run long: every intermediate result is bounded before it is computed.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from functools import cache, reduce
from typing import Any

from rftt_lightning.answers.node import Node, replaced

MAX_BITS = 12_000
"""Largest numerator or denominator, in bits (some 3,600 decimal digits)."""


def _is_prime(number: int) -> bool:
    """Miller-Rabin with 24 random bases: wrong with probability below 2^-48."""
    odd, twos = number - 1, 0
    while odd % 2 == 0:
        odd, twos = odd // 2, twos + 1
    for base in [random.SystemRandom().randrange(2, 1 << 64) for _ in range(24)]:
        power = pow(base, odd, number)
        if power in (1, number - 1):
            continue
        if not any((power := power * power % number) == number - 1 for _ in range(twos - 1)):
            return False
    return True


@cache
def _field() -> tuple[int, int]:
    """A random prime of 255 bits, 1 modulo 4, and a root of -1 modulo it. Found when first needed, and by each process for itself: a
    known prime could be written into an answer."""
    draw = random.SystemRandom()
    while not _is_prime(prime := (draw.getrandbits(255) | 1 << 254) & ~2 | 1):
        pass
    roots = (pow(base, (prime - 1) // 4, prime) for base in range(2, 1000))
    return prime, next(root for root in roots if root**2 % prime == prime - 1)


def _point(names: Iterable[str]) -> dict[str, int]:
    """Random residues for the symbols and for pi; i is the root of -1."""
    prime, root = _field()
    return {name: random.SystemRandom().randrange(2, prime - 1) for name in (*names, "pi")} | {"i": root}


class Undecided(ArithmeticError):
    """Not computable by this cheap means (wrong kind, undefined, or over budget)."""


def rational(node: Node) -> Fraction:
    """The exact value; raises :class:`Undecided` for anything irrational, symbolic, undefined or too large."""
    if node.op == "num":
        return _bounded(Fraction(node.value))
    if node.op == "base":
        return _in_base(node.args[0].value, int(node.value))
    if node.op not in _RATIONAL and node.op != "call":
        raise Undecided(node.op)
    args = [rational(arg) for arg in node.args]
    try:
        rule = _CALLS[node.value] if node.op == "call" else _RATIONAL[node.op]
        return _bounded(rule(*args))
    except (KeyError, ZeroDivisionError, TypeError) as error:
        raise Undecided(f"{node.op}{node.value}") from error


def _bounded(value: Fraction | int) -> Fraction:
    value = Fraction(value)
    if max(value.numerator.bit_length(), value.denominator.bit_length()) > MAX_BITS:
        raise Undecided("too large")
    return value


def _power(base: Fraction, exponent: Fraction) -> Fraction:
    if exponent.denominator != 1:
        if base < 0:
            raise Undecided("a fractional power of a negative number")
        return _power(_root(base, Fraction(exponent.denominator)), Fraction(exponent.numerator))
    if base == exponent == 0:
        raise Undecided("0^0")
    bits = max(base.numerator.bit_length(), base.denominator.bit_length())
    if abs(exponent) * max(bits - 1, 0) > MAX_BITS or (bits > 1 and abs(exponent) > MAX_BITS):
        raise Undecided("too large")
    return base ** (int(exponent) % 2 if bits <= 1 and base else int(exponent))


def _root(value: Fraction, index: Fraction) -> Fraction:
    """Exact real root of a rational; odd roots of negative numbers are negative."""
    if index.denominator != 1 or not 1 <= index <= 64 or (value < 0 and index % 2 == 0):
        raise Undecided("root")
    if value < 0:
        return -_root(-value, index)
    parts = [_integer_root(part, int(index)) for part in (value.numerator, value.denominator)]
    return Fraction(*parts)


def _integer_root(value: int, index: int) -> int:
    low, high = 0, 1 << -(-value.bit_length() // index)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if middle**index <= value else (low, middle - 1)
    if low**index != value:
        raise Undecided("irrational root")
    return low


def _whole(value: Fraction, limit: int) -> int:
    if value.denominator != 1 or not 0 <= value <= limit:
        raise Undecided("not a small whole number")
    return int(value)


def _binomial(top: Fraction, bottom: Fraction) -> int:
    return math.comb(_whole(top, 5000), _whole(bottom, 5000))


def _double_factorial(value: Fraction) -> int:
    return math.prod(range(_whole(value, 1200), 0, -2))


def _modulo(value: Fraction, modulus: Fraction) -> Fraction:
    return value % modulus if modulus > 0 else _undecided()


def _undecided() -> Fraction:
    raise Undecided("modulus")


def _in_base(digits: str, base: int) -> Fraction:
    try:
        return _bounded(int(digits, base))
    except ValueError as error:
        raise Undecided(f"{digits} in base {base}") from error


_RATIONAL: dict[str, Callable[..., Any]] = {
    "+": lambda *terms: reduce(lambda a, b: _bounded(a + b), terms), "*": lambda a, b: a * b, "/": lambda a, b: a / b,
    "neg": lambda a: -a, "^": _power, "root": _root, "!": lambda a: math.factorial(_whole(a, 1200)), "!!": _double_factorial, "binom": _binomial, "abs": abs, "floor": math.floor,
    "ceil": math.ceil, "mod": _modulo, "percent": lambda a: a / 100, "ratio": lambda a, b: a / b,
}  # fmt: skip
_CALLS: dict[str, Callable[..., Any]] = {
    "max": max, "min": min, "gcd": lambda a, b: math.gcd(_whole(a, 10**30), _whole(b, 10**30)),
    "lcm": lambda a, b: math.lcm(_whole(a, 10**30), _whole(b, 10**30)),
}  # fmt: skip


def same_polynomial(left: Node, right: Node) -> bool:
    """Are these rational functions (of symbols, pi and i) identical? Values at random points modulo a 255-bit prime: unequal
    is certain (pi is transcendental), equal wrong with probability below 2^-200. Raises :class:`Undecided` for others."""
    point = _point(left.symbols() | right.symbols())
    return _residue(left, point) == _residue(right, point)


def proportional_polynomials(left: Node, right: Node) -> int:
    """Sign of the constant k in left = k * right, 0 if there is none. Raises :class:`Undecided` for what is no polynomial."""
    if _has_fraction(left) or _has_fraction(right):
        raise Undecided("no polynomial")
    names = left.symbols() | right.symbols()
    points = [_point(names) for _ in range(3)]
    values = [(_residue(left, point), _residue(right, point)) for point in points]
    (first, second), *others = values
    if 0 in (first, second):
        return int(first == second)
    prime, draw = _field()[0], random.SystemRandom()
    if any(first * b % prime != second * a % prime for a, b in others):
        return 0
    at = {n: Node("num", value=f"{draw.randrange(2, 10**6)}/{draw.randrange(2, 10**6)}") for n in (*names, "pi")}
    quotient = rational(replaced(left, at)) / rational(replaced(right, at))
    return 1 if quotient > 0 else -1


def _has_fraction(node: Node) -> bool:
    """Does a symbol stand below a fraction line (or in a negative power)?"""
    below = node.op == "/" and node.args[1].symbols()
    power = node.op == "^" and (node.args[0].symbols() and node.args[1].op == "neg")
    return bool(below or power) or any(map(_has_fraction, node.args))


def _residue(node: Node, point: Mapping[str, int]) -> int:
    prime = _field()[0]
    if node.op == "sym" and node.value in point:
        return point[node.value]
    if node.op == "+":
        return sum(_residue(arg, point) for arg in node.args) % prime
    if node.op == "neg":
        return -_residue(node.args[0], point) % prime
    if node.op == "*":
        return _residue(node.args[0], point) * _residue(node.args[1], point) % prime
    if node.op == "/":
        return _residue(node.args[0], point) * _inverse(_residue(node.args[1], point)) % prime
    if node.op == "^":
        exponent = rational(node.args[1])
        if exponent.denominator != 1 or abs(exponent) > 10**6:
            raise Undecided("exponent")
        base = _residue(node.args[0], point)
        if base == 0 and exponent <= 0:
            raise Undecided("0^0")
        return pow(base if exponent >= 0 else _inverse(base), abs(int(exponent)), prime)
    value = rational(node)
    return value.numerator * _inverse(value.denominator) % prime


def _inverse(value: int) -> int:
    prime = _field()[0]
    if value % prime == 0:
        raise Undecided("division by zero")
    return pow(value, -1, prime)


def approximate(node: Node) -> float:
    """A rough value for ordering interval ends; raises :class:`Undecided` when there is none."""
    if node.op == "sym" and node.value in _FLOATS:
        return _FLOATS[node.value]
    try:
        return float(rational(node))
    except (Undecided, OverflowError):
        pass
    try:
        return _APPROXIMATIONS[node.op](*[approximate(arg) for arg in node.args])
    except (KeyError, ArithmeticError, ValueError, TypeError) as error:
        raise Undecided(node.op) from error


_FLOATS = {"pi": math.pi, "e": math.e, "oo": math.inf}


def _real_root(value: float, index: float) -> float:
    return math.pow(value, 1 / index)


_APPROXIMATIONS: dict[str, Callable[..., float]] = {
    "+": lambda *terms: sum(terms), "*": lambda a, b: a * b, "/": lambda a, b: a / b, "neg": lambda a: -a, "^": math.pow,
    "root": _real_root, "abs": abs, "percent": lambda a: a / 100,
}  # fmt: skip


def too_large(node: Node) -> bool:
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
    return any(too_large(arg) for arg in node.args)
