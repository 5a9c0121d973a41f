"""From two texts to a verdict: how they may be read, which readings to compare, and what was the reason."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from rftt_lightning.answers.clean import clean
from rftt_lightning.answers.equal import Comparison, Prover
from rftt_lightning.answers.extract import boxes, extract, last_number
from rftt_lightning.answers.node import Node, Unreadable
from rftt_lightning.answers.parse import MAX_LENGTH, parse
from rftt_lightning.answers.units import NAMES, read_unit
from rftt_lightning.answers.words import choice, number, opposed, without_letter, words
from rftt_lightning.core.contracts import Status, UserError, Verdict

UNREADABLE = "unreadable answer"
KINDS = (None, "answer", "response")


class Question(NamedTuple):
    """A comparison to decide, and the key under which it is remembered. ``loose`` as in :func:`decide`."""

    gold: str
    answer: str
    loose: bool


@lru_cache(maxsize=4096)
def gold_answer(gold: str) -> str:
    """A gold may be a bare answer, a boxed one, or a whole solution that states it."""
    text = gold.strip()
    if boxes(text) or "####" in text:
        return extract(text) or text
    if "final answer" in text.lower():
        return extract(text) or text
    return re.sub(r"^.*\\boxed\{", "", text, flags=re.DOTALL) if r"\boxed{" in text else text


def read(gold: str, response: str | None, kind: str | None) -> Question | Verdict:
    """What is to be compared, or the verdict where there is nothing to compare."""
    if kind not in KINDS:
        raise UserError(f"kind is {kind!r}; use 'answer' for a bare answer, 'response' for a whole response, or None")
    answer = _bare(response) if kind == "answer" else extract(response)
    gold, answer = gold or "", answer and answer.strip()
    if not gold.strip():
        return Verdict(Status.UNPARSABLE_GOLD, answer and answer[:MAX_LENGTH], gold[:MAX_LENGTH], "empty gold")
    if not answer:
        return Verdict(Status.NO_ANSWER, None, gold[:MAX_LENGTH], "no answer")
    if gold.strip() == answer:
        return Verdict(Status.RIGHT, answer[:MAX_LENGTH], gold[:MAX_LENGTH], "identical")
    gold = gold_answer(gold)
    if max(len(gold), len(answer)) > MAX_LENGTH:
        return Verdict(Status.WRONG, answer[:MAX_LENGTH], gold[:MAX_LENGTH], "too long")
    return Question(gold, answer, kind != "answer" and "boxed" not in str(response))


def _bare(response: str | None) -> str | None:
    text = (response or "").strip()
    return (extract(text) if re.search(r"\\boxed|\\fbox|<output>", text) else text) or None


def decide(gold: str, answer: str, prover: Prover, loose: bool = False) -> Verdict:
    """Is this final answer equal to this gold answer? Each at most MAX_LENGTH characters.

    ``loose``: the answer was taken from running text; where it cannot be read as a whole its last number counts.
    Raises :class:`~rftt_lightning.answers.equal.NeedsProof` if ``prover`` does.
    """
    verdict = _decide(gold, answer, prover)
    if loose and verdict.rule == UNREADABLE:
        value = last_number(answer)
        return _decide(gold, value, prover) if value else verdict
    return verdict


def _decide(gold: str, answer: str, prover: Prover) -> Verdict:
    plain = clean(gold), clean(answer)
    if plain[0] and _squeeze(plain[0]) == _squeeze(plain[1]):
        return Verdict(Status.RIGHT, answer, gold, "identical", plain)
    if _wordy(plain[0]) and _wordy(plain[0]) == _wordy(plain[1]):
        return Verdict(Status.RIGHT, answer, gold, "text", plain)
    chosen = choice(*plain)
    if chosen is not None:
        return Verdict(Status.RIGHT if chosen else Status.WRONG, answer, gold, "choice", plain)
    plain = without_letter(plain[0]), plain[1]
    if opposed(*plain):
        return Verdict(Status.WRONG, answer, gold, "text", plain)
    golds, answers = list(_readings(plain[0])), list(_readings(plain[1]))
    if any(g.op == "unit" or not g.symbols() for g in golds):
        answers += _readings(_with_unit(plain[1], any(g.op == "unit" for g in golds)))
    if any(a.op == "unit" for a in answers):
        golds += _readings(_with_unit(plain[0], glued=True))
    if re.fullmatch(r"-?[1-9]\d{0,2}(,\d{3})+", plain[0]):
        golds = golds[:1]  # a gold 1,234 is a number; an answer may still mean a list
    if not golds:
        return _as_text(gold, answer, plain)
    return _try_readings(gold, answer, golds, answers, Comparison(prover), plain)


def _try_readings(
    gold: str, answer: str, golds: list[Node], answers: list[Node], comparison: Comparison, plain: tuple[str, str]
) -> Verdict:
    """Right if any pair of readings is equal; the rule of the first pair names a refusal."""
    first: Verdict | None = None
    for g in golds:
        for a in answers:
            forms = (_short(g), _short(a))
            right = comparison.equal(g, a)
            verdict = Verdict(Status.RIGHT if right else Status.WRONG, answer, gold, comparison.rule, forms)
            if right:
                return verdict
            first = first or verdict
    if first is None:
        text = _as_text(gold, answer, plain)
        return text if text.right else Verdict(Status.WRONG, answer, gold, UNREADABLE)
    return first


def _short(node: Node) -> str:
    text = str(node)
    return text if len(text) < 500 else text[:497] + "..."


def _readings(text: str) -> Iterator[Node]:
    """The ways commas between digits can be meant; none if the text cannot be read."""
    if re.match(r"[a-z\\]", text, re.IGNORECASE):
        text = number(text) or text
    seen = set()
    ways = ("group", "list", "decimal") if re.search(r"\d,\d", text) else ("list",)
    for comma in ways:
        try:
            node = parse(text, comma)
        except Unreadable:
            continue
        if node not in seen:
            seen.add(node)
            yield node


def _with_unit(text: str, glued: bool) -> str:
    """36 m^2 with its letters upright; nothing if it does not end in letters that are a unit. ``glued``: also 36m."""
    match = _LETTERS_AT_END.match(text) if len(text) <= 100 else None
    if not match or not (glued or match[2]) or re.search(r"(?<![\\a-zA-Z])[a-zA-Z]", match[1]):
        return ""
    known = all(word in NAMES or word.lower() in NAMES for word in re.findall("[a-zA-Z]+", match[3]))
    return rf"{match[1]}\text{{{match[3]}}}" if known and read_unit(match[3]) else ""


_LETTERS_AT_END = re.compile(r"(.*[\d})])(\s*)([a-zA-Z][a-zA-Z /*^{}\d-]{0,24})$")


def _squeeze(text: str) -> str:
    """Without spaces, but for those that part numbers: 1, 234 is no 1,234."""
    return re.sub(r"(?<![\d,])\s+|\s+(?!\d)", "", text)


def _wordy(text: str) -> str:
    """The words of a text without formulas; nothing for others."""
    bare = re.sub(r"\\text|[{}]", " ", text)
    if re.search(r"[^\w\s.']|_|\d\.|\.\d|(?<![a-zA-Z])\w'", bare):
        return ""
    wordy = r"\text" in text or bare.strip().lower() in _SHORT_WORDS or re.search("[a-zA-Z]{3}", bare)
    return words(bare) if wordy else ""


_SHORT_WORDS = frozenset(["no", "ok", "up"])


def _as_text(gold: str, answer: str, plain: tuple[str, str]) -> Verdict:
    """The last resort, for words and for what neither side's reader understood: the same words and signs."""
    folded = [re.sub(r"\\text|[\s$]", "", text).lower() for text in plain]
    wordy = [words(text) for text in plain]
    has_math = any(re.search(r"[\d\\^_=<>+*/(\[-]", text.replace(r"\text", "")) for text in plain)
    same = bool(folded[0]) and (folded[0] == folded[1] or (not has_math and bool(wordy[0]) and wordy[0] == wordy[1]))
    return Verdict(Status.RIGHT if same else Status.UNPARSABLE_GOLD, answer, gold, "text", (wordy[0], wordy[1]))
