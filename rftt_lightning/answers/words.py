"""Answers in words: what is no difference between two texts, numbers that are spelled out, letters of a multiple choice."""

from __future__ import annotations

import re

_SMALL = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen eighteen nineteen".split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_VALUES = {word: value for value, word in enumerate(_SMALL)} | {word: 10 * tens for tens, word in enumerate(_TENS, 2)}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9, "dozen": 12}
_ORDINALS = {
    "first": "one",
    "second": "two",
    "third": "three",
    "fifth": "five",
    "eighth": "eight",
    "ninth": "nine",
    "twelfth": "twelve",
}
_PARTS = {"half": 2, "halves": 2, "third": 3, "thirds": 3, "quarter": 4, "quarters": 4} | {
    f"{word}th{s}": value for word, value in _VALUES.items() if value > 3 for s in ("", "s")
} | {"fifth": 5, "fifths": 5, "eighth": 8, "eighths": 8, "ninth": 9, "ninths": 9}  # fmt: skip

_SAME = {
    "does not exist": "dne", "doesnt exist": "dne", "not exist": "dne", "not defined": "undefined", "no solutions": "no solution",
    "no real solutions": "no real solution", "none of above": "none of these", "none of these above": "none of these", "t": "true", "f": "false",
    "equals infinity": "infinity",
}  # fmt: skip
_PASSED_OVER = frozenset("a an the answer is its it option choice limit".split())
EMPTY = frozenset({"no solution", "empty set", "null set"})
"""Words for the empty set."""

CHANGES_MEANING = re.compile(
    r"\b(?:not|no|never|up to|twice|double|triple|half|except|less|more|fewer|greater|most|least|over|under|below|above|between|than|minus|negative|neg|divided|root|log|factorial|squared|cubed|cannot|tenths?|hundredths?|thousandths?)\b",
    re.IGNORECASE,
)
"""Words beside a value that are no decoration."""


def words(text: str) -> str:
    r"""Text for comparison: case, articles, punctuation and spacing are no difference. ``(B)`` is ``b``."""
    plain = re.sub(r"\\text|[^\w\s]", " ", text.lower().replace("n't", " not").replace("'", "")).split()
    kept = " ".join(word for word in plain if word not in _PASSED_OVER or len(plain) == 1)
    return _SAME.get(kept, kept)


def number(text: str) -> str | None:
    """A number in words as digits: ``twenty-one`` 21, ``third`` 3, ``two thirds`` \\frac{2}{3}, ``noon``; None for other words."""
    found = re.sub(r"\\text|[{}.]", " ", text.lower()).replace("-", " ").split()
    if not 1 <= len(found) <= 12:
        return None
    if found[0] == "a" and found[1:2] and found[1] in _SCALES:
        found = found[1:]
    if found in (["noon"], ["midnight"]):
        return r"12:00\PM" if found == ["noon"] else r"12:00\AM"
    if found[-1] in ("percent", "dollars", "cents", "degrees"):
        inner = number(" ".join(found[:-1])) if len(found) > 1 else None
        return inner and f"{inner} {found[-1]}"
    if found[-1] in _PARTS and "and" in found:  # two and one third
        place = found.index("and")
        whole, part = _cardinal(found[:place]), _cardinal(found[place + 1 : -1])
        return None if whole is None or part is None else rf"{whole}\frac{{{part}}}{{{_PARTS[found[-1]]}}}"
    top = 1 if found in (["half"], ["a", "half"]) else _cardinal(found[:-1])
    if found[-1] in _PARTS and top is not None:
        return rf"\frac{{{top}}}{{{_PARTS[found[-1]]}}}"
    last = _ORDINALS.get(found[-1]) or re.sub(r"ieth$", "y", found[-1]).removesuffix("th")
    value = _cardinal([*found[:-1], last])
    return None if value is None else str(value)


def _cardinal(found: list[str]) -> int | None:
    """two hundred and five: 205. A unit comes first, or after tens or a scale; None for what is no number."""
    total, group, last = 0, 0, "start"
    for word in found:
        value = _VALUES.get(word)
        if word == "and" and last == "scale":
            continue
        if value is not None and (last in ("start", "scale") or (last == "tens" and 0 < value < 10)):
            group, last = group + value, "tens" if word in _TENS else "unit"
        elif word in _SCALES and (
            last in ("tens", "unit") or word == "dozen" or (word == "hundred" and last == "start")
        ):
            group, last = max(group, 1) * _SCALES[word], "scale"
            if _SCALES[word] >= 1000:
                total, group = total + group, 0
        else:
            return None
    return None if last == "start" else total + group


_LETTERED = re.compile(r"(?:\\text\s*\{)?\s*\(([A-J])\)\s*\}?\s*(?=[\w$\\-])(?!\\c[au]p)(.+)")
_MARKED = re.compile(
    r"(?:\\text\s*\{)?\s*(?:(?:option|choice|answer)\s*:?\s*(?:is\s*)?)?(?:\(([A-Ja-j])\)|([A-J])(?=[.):]|\s*\}?$))",
    re.IGNORECASE,
)


def choice(gold: str, answer: str) -> bool | None:
    """Multiple choice: a gold of one capital letter, or ``(D) 36``, against an answer that begins with a letter; None if this is
    none."""
    wanted = re.fullmatch(r"(?:\\text\s*\{)?\s*\(?([A-J])\)?\.?\s*\}?", gold) or _LETTERED.fullmatch(gold)
    marked = _MARKED.match(answer)
    if not wanted or not marked or (marked[2] or "A").islower():
        return None
    if re.match(r"\W*(?:and|or|,|/|&)\W*[A-J](?![a-zA-Z])", answer[marked.end() :]):
        return False  # two are chosen
    return wanted[1] == (marked[1] or marked[2]).upper()


def without_letter(gold: str) -> str:
    """``(D) 36`` is 36 where the answer names no letter."""
    lettered = _LETTERED.fullmatch(gold)
    return lettered[2].removesuffix("}") if lettered and "{" not in lettered[2] else lettered[2] if lettered else gold


_OPPOSITES = [tuple(pair.split("/")) for pair in (
    "increase/decrease increased/decreased gain/loss profit/loss north/south east/west left/right above/below before/after up/down "
    "clockwise/counterclockwise early/late faster/slower larger/smaller deposit/withdrawal forward/backward maximum/minimum"
).split()]  # fmt: skip


def opposed(gold: str, answer: str) -> bool:
    """Does one text say increase and the other decrease?"""
    left, right = ({*re.findall(r"[a-z]+", text.lower())} for text in (gold, answer))
    return any(
        {left & pair != right & pair, len(left & pair), len(right & pair)} == {True} for pair in map(set, _OPPOSITES)
    )
