"""Which digits are one number: separators of thousands, decimal commas, cycles of repeating decimals, progressions in dots."""

from __future__ import annotations

import re
from fractions import Fraction

_BRACKET = re.compile(r"\s*(?:\\\{|[\[({])")
_DECIMAL_COMMA = re.compile(r"^([-+\s]*(?:\d+(?=,\d\d(?!\d(?!\d)))|0)),(\d+)(?![\d,.])(?!\s*[,;\d])")
_GROUPED = re.compile(r"(?<![\d,.])[1-9](?:\d{0,2}(?:,\d{3})+|\d?(?:,\d\d)+,\d{3})(?![\d,])")
_SPACED = re.compile(
    r"(?<![\d,.])\d{1,3}(?:(?: \d{3})+(?![\d,/])|(?:'\d{3})+(?!\d)|(?:\.\d{3}){2,}(?![\d.])|(?:_\d{3})+(?!\d))"
)
_TWO_DOTS = re.compile(r"(?<!\d)(\d*)\.(\d*)\\dot\s*\{?(\d)\}?(\d*)\\dot\s*\{?(\d)\}?")
_CYCLE = re.compile(r"(?<!\d)(\d*)\.(\d*)(?:\\(?:overline|bar|dot)\s*(?:\{(\d+)\}|(\d))|\((\d+)\)(?!\d))")
_ELLIPSIS = re.compile(r"(?<!\d)(\d{0,40})\.(\d{0,12}?)((\d{1,8}?)\4{1,40})\s*\.\.\.")
_PROGRESSION = re.compile(
    r"(-?\d{1,6})\s*,\s*(-?\d{1,6})\s*,\s*((?:-?\d{1,6}\s*,\s*){0,8})\.\.\.\s*,?\s*(-?\d{1,6})(?![\d.])"
)


def join_numbers(text: str, comma: str) -> str:
    """Digits that are one number: separators out, cycles of repeating decimals as fractions."""
    bracketed = _BRACKET.match(text) is not None
    if comma == "decimal":
        text = _DECIMAL_COMMA.sub(r"\1.\2", text)
    elif comma == "group" and not bracketed:
        text = _GROUPED.sub(lambda m: m[0].replace(",", ""), text)
    text = _PROGRESSION.sub(_expanded, text)
    text = _SPACED.sub(lambda m: re.sub(r"[ '_.]", "", m[0]), text)
    if "." in text:
        text = _TWO_DOTS.sub(lambda m: _repeating(m[1], m[2], m[3] + m[4] + m[5]), text)
        text = _CYCLE.sub(lambda m: _repeating(m[1], m[2], m[3] or m[4] or m[5]), text)
        text = _ELLIPSIS.sub(lambda m: _repeating(m[1], m[2], m[4]) if len(m[3]) >= 3 else m[0], text)
    return text


def _expanded(match: re.Match[str]) -> str:
    """1, 2, ..., 5 in full; left as it is if it is no arithmetic progression, or a long one."""
    shown = [int(match[1]), int(match[2]), *map(int, re.findall(r"-?\d+", match[3]))]
    step = shown[1] - shown[0]
    terms = list(range(shown[0], int(match[4]) + (1 if step > 0 else -1), step)) if step else []
    if not len(shown) < len(terms) <= 100 or terms[: len(shown)] != shown or terms[-1] != int(match[4]):
        return match[0]
    return ", ".join(map(str, terms))


def _repeating(whole: str, head: str, cycle: str) -> str:
    value = Fraction(int((whole or "0") + head), 10 ** len(head))
    value += Fraction(int(cycle), (10 ** len(cycle) - 1) * 10 ** len(head))
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
