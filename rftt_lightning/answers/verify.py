"""``verify(gold, response) -> Verdict``: the one door through which every reward and every reported number passes."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from rftt_lightning.answers.clean import clean
from rftt_lightning.answers.equal import Comparison, words
from rftt_lightning.answers.extract import boxes, extract, last_number
from rftt_lightning.answers.parse import MAX_LENGTH, Node, Unreadable, parse
from rftt_lightning.answers.workers import TimedOut
from rftt_lightning.core.contracts import Status, UserError, Verdict

SECONDS = 2.0
"""Wall-clock budget of one comparison."""
KINDS = (None, "answer", "response")


def verify(gold: str, response: str | None, *, kind: str | None = None, seconds: float = SECONDS) -> Verdict:
    r"""Is ``response`` right, given the gold answer? Never raises on what a model wrote, runs none of it, and ends in time.

    ``kind`` says what ``response`` is: ``"response"`` a whole response, ``"answer"`` a bare final answer; None finds out.

    >>> verify("1/2", r"So we get \boxed{0.5}.").status
    <Status.RIGHT: 'right'>
    """
    if kind not in KINDS:
        raise UserError(f"kind is {kind!r}; use 'answer' for a bare answer, 'response' for a whole response, or None")
    answer = _bare(response) if kind == "answer" else extract(response)
    verdict = _compare(gold or "", answer, seconds)
    if verdict.rule == "unreadable answer" and kind != "answer" and answer and "boxed" not in str(response):
        value = last_number(answer)
        return _compare(gold, value, seconds) if value else verdict
    return verdict


def verify_many(
    pairs: Iterable[tuple[str, str | None]], *, kind: str | None = None, workers: int = 2, seconds: float = SECONDS
) -> list[Verdict]:
    """Verdicts of (gold, response) pairs in input order; up to ``workers`` of them are proved at the same time."""
    pairs = list(pairs)
    if workers < 2 or len(pairs) < 2:
        return [verify(gold, response, kind=kind, seconds=seconds) for gold, response in pairs]
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda pair: verify(*pair, kind=kind, seconds=seconds), pairs))


def gold_answer(gold: str) -> str:
    """A gold may be a bare answer, a boxed one, or a whole solution that states it."""
    text = gold.strip()
    if boxes(text) or "####" in text:
        return extract(text) or text
    if "final answer" in text.lower():
        return extract(text) or text
    return re.sub(r"^.*\\boxed\{", "", text, flags=re.DOTALL) if r"\boxed{" in text else text


def _bare(response: str | None) -> str | None:
    text = (response or "").strip()
    return (extract(text) if r"\boxed" in text or "<output>" in text else text) or None


def _compare(gold: str, answer: str | None, seconds: float) -> Verdict:
    if not gold.strip():
        return Verdict(Status.UNPARSABLE_GOLD, answer and answer[:MAX_LENGTH], gold[:MAX_LENGTH], "empty gold")
    if answer is None or not answer.strip():
        return Verdict(Status.NO_ANSWER, None, gold[:MAX_LENGTH], "no answer")
    if gold.strip() == answer.strip():
        return Verdict(Status.RIGHT, answer[:MAX_LENGTH], gold[:MAX_LENGTH], "identical")
    if len(gold) <= MAX_LENGTH and len(answer) <= MAX_LENGTH:
        try:
            return _decide(gold_answer(gold), answer, seconds)
        except TimedOut:  # no knowledge, so never cached
            return Verdict(Status.TIMED_OUT, answer, gold, "budget spent")
    return Verdict(Status.WRONG, answer[:MAX_LENGTH], gold[:MAX_LENGTH], "too long")


@lru_cache(maxsize=4096)
def _decide(gold: str, answer: str, seconds: float) -> Verdict:
    plain = clean(gold), clean(answer)
    if plain[0] and _squeeze(plain[0]) == _squeeze(plain[1]):
        return Verdict(Status.RIGHT, answer, gold, "identical", plain)
    if _wordy(plain[0]) and _wordy(plain[0]) == _wordy(plain[1]):
        return Verdict(Status.RIGHT, answer, gold, "text", plain)
    choice = _choice(*plain)
    if choice is not None:
        return Verdict(Status.RIGHT if choice else Status.WRONG, answer, gold, "choice", plain)
    golds, answers = list(_readings(plain[0])), list(_readings(plain[1]))
    if re.fullmatch(r"-?[1-9]\d{0,2}(,\d{3})+", plain[0]):
        golds = golds[:1]  # a gold 1,234 is a number; an answer may still mean a list
    if not golds:
        return _as_text(gold, answer, plain)
    return _try_readings(gold, answer, golds, answers, Comparison(seconds), plain)


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
        return text if text.right else Verdict(Status.WRONG, answer, gold, "unreadable answer")
    return first


def _short(node: Node) -> str:
    text = str(node)
    return text if len(text) < 500 else text[:497] + "..."


def _readings(text: str) -> Iterator[Node]:
    """The ways commas between digits can be meant; none if the text cannot be read."""
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


def _squeeze(text: str) -> str:
    """Without spaces, but for those that part numbers: 1, 234 is no 1,234."""
    return re.sub(r"(?<![\d,])\s+|\s+(?!\d)", "", text)


def _wordy(text: str) -> str:
    """The words of a text without formulas; nothing for others."""
    bare = text.replace(r"\text", "")
    return (
        ""
        if re.search(r"[^\w\s{}.']|_|\d\.|\.\d", bare)
        else words(Node("text", value=bare.replace("{", "").replace("}", "")))
    )


def _choice(gold: str, answer: str) -> bool | None:
    """Multiple choice: a gold of one capital letter against an answer that begins with one."""
    gold_letter = re.fullmatch(r"(?:\\text\s*\{)?\(?([A-J])\)?\.?\}?", gold)
    marked = re.match(r"(?:\\text\s*\{)?\s*(?:\(([A-J])\)|([A-J])(?=[.):]|\}?$))", answer)
    if not gold_letter or not marked:
        return None
    return gold_letter[1] == (marked[1] or marked[2])


def _as_text(gold: str, answer: str, plain: tuple[str, str]) -> Verdict:
    """The last resort, for words and for what neither side's reader understood: the same words and signs."""
    folded = [re.sub(r"\\text|[\s$]", "", text).lower() for text in plain]
    wordy = [words(Node("text", value=text)) for text in plain]
    has_math = any(re.search(r"[\d\\^_=<>+*/(\[-]", text.replace(r"\text", "")) for text in plain)
    same = bool(folded[0]) and (folded[0] == folded[1] or (not has_math and bool(wordy[0]) and wordy[0] == wordy[1]))
    return Verdict(Status.RIGHT if same else Status.UNPARSABLE_GOLD, answer, gold, "text", (wordy[0], wordy[1]))
