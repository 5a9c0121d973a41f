"""Units of measurement, angles and times of day: what a unit text means, and the value of a tree in its unit."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from rftt_lightning.answers.node import Node, num, sym

_INCH = Fraction(127, 5000)  # metres
_POUND = Fraction(45359237, 100_000_000)  # kilograms
_TABLE: dict[str, tuple[str, Fraction | int, str]] = {
    # unit: dimension (or a product of them), factor, names; only within one dimension can units be converted
    "s": ("time", 1, "sec secs second seconds"), "min": ("time", 60, "mins minute minutes"),
    "h": ("time", 3600, "hr hrs hour hours"), "day": ("time", 86400, "days"), "week": ("time", 604800, "weeks wk wks"),
    "month": ("month", 1, "months"), "year": ("month", 12, "years yr yrs"), "ms": ("time", Fraction(1, 1000), "millisecond milliseconds"),
    "mm": ("length", Fraction(1, 1000), "millimeter millimeters millimetre millimetres"),
    "cm": ("length", Fraction(1, 100), "centimeter centimeters centimetre centimetres"), "dm": ("length", Fraction(1, 10), "decimeter decimeters"),
    "m": ("length", 1, "meter meters metre metres"), "km": ("length", 1000, "kilometer kilometers kilometre kilometres"),
    "in": ("length", _INCH, "inch inches"), "ft": ("length", 12 * _INCH, "foot feet"), "yd": ("length", 36 * _INCH, "yard yards yds"),
    "mi": ("length", 63360 * _INCH, "mile miles"), "mg": ("mass", Fraction(1, 10**6), "milligram milligrams"),
    "g": ("mass", Fraction(1, 1000), "gram grams"), "kg": ("mass", 1, "kilogram kilograms kgs"), "t": ("mass", 1000, "tonne tonnes"),
    "lb": ("mass", _POUND, "lbs pound pounds"), "oz": ("mass", _POUND / 16, "ounce ounces"),
    "mL": ("length^3", Fraction(1, 10**6), "ml milliliter milliliters millilitre millilitres cc"),
    "L": ("length^3", Fraction(1, 1000), "l liter liters litre litres"),
    "acre": ("length^2", Fraction(316160658, 78125), "acres"), "hectare": ("length^2", 10_000, "hectares ha"),
    "gallon": ("gallon", 1, "gallons gal"), "quart": ("gallon", Fraction(1, 4), "quarts qt"), "pint": ("gallon", Fraction(1, 8), "pints pt"),
    "cup": ("gallon", Fraction(1, 16), "cups"),
    "dollar": ("dollar", 1, "dollars usd bucks"), "cent": ("dollar", Fraction(1, 100), "cents"),
    "euro": ("euro", 1, "euros eur"), "yuan": ("yuan", 1, "rmb"), "rupee": ("rupee", 1, "rupees rs"), "yen": ("yen", 1, ""),
    "degree": ("angle", 1, "degrees deg"), "rad": ("radian", 1, "radian radians"),
    "J": ("mass length^2 time^-2", 1, "j joule joules"), "N": ("mass length time^-2", 1, "n newton newtons"),
    "W": ("mass length^2 time^-3", 1, "w watt watts"), "Pa": ("mass length^-1 time^-2", 1, "pa pascal pascals"),
    "Hz": ("time^-1", 1, "hz hertz"), "mph": ("length time^-1", 63360 * _INCH / 3600, ""), "kph": ("length time^-1", Fraction(5, 18), "kmph"),
    "V": ("volt", 1, "v volt volts"), "A": ("ampere", 1, "amp amps ampere amperes"), "ohm": ("ohm", 1, "ohms"), "mol": ("mol", 1, "mole moles"),
    "K": ("kelvin", 1, "kelvin"), "celsius": ("celsius", 1, ""), "fahrenheit": ("fahrenheit", 1, ""),
}  # fmt: skip
NAMES = {name: unit for unit, (_, _, names) in _TABLE.items() for name in (unit, *names.split())}
AMBIGUOUS = frozenset("s h m g t l j n w v in a A J L N V W K Hz min sec mi ms deg rad pa Pa amp ha gal mol pt".split())
"""Outside upright text these letters name quantities (and ``in`` is a word)."""

_POWERS = {"square": 2, "sq": 2, "squared": 2, "cubic": 3, "cu": 3, "cubed": 3}
_TOKENS = re.compile(r"([a-zA-Z]+)|\^\s*\{?\s*(-?\d)\s*\}?|(/)")


class Measure(NamedTuple):
    """``cm^2`` is Measure((("length", 2),), 1/10000)."""

    dimensions: tuple[tuple[str, int], ...]
    factor: Fraction


@lru_cache(maxsize=4096)
def read_unit(text: str) -> str:
    """The unit that a text names, spelled ``m s^-2``; empty if it names none. Other words in it are passed over."""
    found: list[tuple[str, int]] = []
    sign, waiting = 1, 0
    text = re.sub(
        r"degrees?\s*([cf])\b", lambda m: {"c": "celsius", "f": "fahrenheit"}[m[1].lower()], text, flags=re.IGNORECASE
    )
    text = re.sub(r"\bin\b(?=\s+[a-z])|\bdegrees?\s+(?=celsius|fahrenheit)", " ", text, flags=re.IGNORECASE)
    for word, exponent, slash in _TOKENS.findall(text):
        name = NAMES.get(word) or NAMES.get(word.lower())
        if exponent and found:
            found[-1] = (found[-1][0], found[-1][1] * int(exponent))
        elif slash or word.lower() in ("per", "an", "a") and found:
            sign = -1
        elif word.lower() in _POWERS:
            power = _POWERS[word.lower()]
            if word.lower().endswith("d") and found:
                found[-1] = (found[-1][0], found[-1][1] * power)
            else:
                waiting = power
        elif name:
            found.append((name, sign * (waiting or 1)))
            waiting = 0
    return " ".join(name if power == 1 else f"{name}^{power}" for name, power in found)


@lru_cache(maxsize=4096)
def measure(unit: str) -> Measure:
    """Dimensions and factor of a unit that :func:`read_unit` spelled."""
    total: Counter[str] = Counter()
    factor = Fraction(1)
    for part in unit.split():
        name, _, power = part.partition("^")
        dimensions, scale, _ = _TABLE[name]
        factor *= Fraction(scale) ** int(power or 1)
        for dimension in dimensions.split():
            base, _, inner = dimension.partition("^")
            total[base] += int(inner or 1) * int(power or 1)
    return Measure(tuple(sorted((name, power) for name, power in total.items() if power)), factor)


def in_units(node: Node) -> tuple[Node, str]:
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
        value, unit = in_units(node.args[0])
        return Node("neg", (value,)), unit
    return node, ""


def in_radians(value: Node, unit: str) -> Node:
    return Node("*", (value, Node("/", (sym("pi"), num(180))))) if unit == "degree" else value


def has_pi(node: Node) -> bool:
    return node == sym("pi") or any(has_pi(arg) for arg in node.args)


def clock(node: Node) -> tuple[int, ...] | None:
    parts = [arg.value for arg in node.args if arg.op == "num" and arg.value.isdigit() and len(arg.value) < 3]
    return tuple(map(int, parts)) if len(parts) == len(node.args) else None


def same_time(gold: Node, answer: Node) -> bool:
    times = []
    for node in (gold, answer):
        hours, *rest = clock(node) or (0,)
        hours = hours % 12 + 12 * (node.value == "pm") if node.value else hours
        times.append((hours, [*rest, 0, 0][:2]))
    loose = bool(gold.value) != bool(answer.value) and max(t[0] for t in times) - min(t[0] for t in times) in (0, 12)
    small = all(clock(n)[0] <= 12 for n in (gold, answer) if not n.value)  # type: ignore[index]
    return times[0][1] == times[1][1] and (times[0][0] == times[1][0] or (loose and small))
