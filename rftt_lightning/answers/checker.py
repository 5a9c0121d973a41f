"""``verify(gold, response) -> Verdict``: the one door through which every reward and every reported number passes."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from rftt_lightning.answers.decide import decide
from rftt_lightning.answers.equal import Unproven
from rftt_lightning.answers.extract import boxes, extract
from rftt_lightning.answers.parse import MAX_LENGTH
from rftt_lightning.answers.pool import POOL, TimedOut
from rftt_lightning.core.contracts import Status, UserError, Verdict

SECONDS = 0.7
"""CPU seconds of one comparison (three times as many by the clock). Of 3,000 pairs of all forms two take more than half of it."""
REMEMBERED = 50_000
"""Decided comparisons that are kept."""
LONG = 500
"""Characters of gold and answer; longer ones are decided anew."""
KINDS = (None, "answer", "response")


class Question(NamedTuple):
    """A comparison to decide, and the key under which it is remembered. ``loose`` as in :func:`decide`."""

    gold: str
    answer: str
    loose: bool


def verify(gold: str, response: str | None, *, kind: str | None = None, seconds: float = SECONDS) -> Verdict:
    r"""Is ``response`` right, given the gold answer? Never raises on what a model wrote, runs none of it, and ends in time.

    ``kind`` says what ``response`` is: ``"response"`` a whole response, ``"answer"`` a bare final answer; None finds out.
    Usable from any thread and process; in an event loop use ``await asyncio.to_thread(verify, gold, response)``.

    >>> verify("1/2", r"So we get \boxed{0.5}.").status
    <Status.RIGHT: 'right'>
    """
    question = _read(gold, response, kind)
    return question if isinstance(question, Verdict) else _verdict(question, seconds)


def verify_many(
    pairs: Iterable[tuple[str, str | None]], *, kind: str | None = None, workers: int = 2, seconds: float = SECONDS
) -> list[Verdict]:
    """Verdicts of (gold, response) pairs in input order. Equal questions are decided once.

    With ``workers`` > 1 so many processes decide them; with 1 this process does, and asks a worker only for proofs.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}; it must be at least 1")
    read = [_read(gold, response, kind) for gold, response in pairs]
    asked = dict.fromkeys(question for question in read if isinstance(question, Question))
    found = {question: verdict for question in asked if (verdict := _MEMORY.get(question))}
    open_questions = [question for question in asked if question not in found]
    if workers == 1 or len(open_questions) < 2:
        found |= {question: _verdict(question, seconds) for question in open_questions}
    else:
        shared, stop = iter(open_questions), threading.Event()
        with ThreadPoolExecutor(workers) as threads:
            try:
                parts = threads.map(lambda _: list(_from_workers(shared, seconds, stop)), range(workers))
                found |= dict(pair for part in parts for pair in part)
            finally:
                stop.set()  # when interrupted: no thread goes on to its next pair
    return [question if isinstance(question, Verdict) else found[question] for question in read]


def forget() -> None:
    """Decide everything anew (for measurements)."""
    _MEMORY.__init__()  # type: ignore[misc]


def gold_answer(gold: str) -> str:
    """A gold may be a bare answer, a boxed one, or a whole solution that states it."""
    text = gold.strip()
    if boxes(text) or "####" in text:
        return extract(text) or text
    if "final answer" in text.lower():
        return extract(text) or text
    return re.sub(r"^.*\\boxed\{", "", text, flags=re.DOTALL) if r"\boxed{" in text else text


def _read(gold: str, response: str | None, kind: str | None) -> Question | Verdict:
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


def _verdict(question: Question, seconds: float) -> Verdict:
    verdict = _MEMORY.get(question)
    if verdict is None:
        POOL.warm_up()
        try:
            verdict = _MEMORY.put(question, decide(question.gold, question.answer, Unproven(), question.loose))
        except Exception:  # noqa: BLE001  NeedsProof; and a fault of ours, which in a worker is a verdict, and no end of a run
            ((_, verdict),) = _from_workers(iter([question]), seconds)
    return verdict


def _from_workers(
    questions: Iterator[Question], seconds: float, stop: threading.Event | None = None
) -> Iterator[tuple[Question, Verdict]]:
    for question, reply in POOL.judge(questions, seconds, stop):
        if isinstance(reply, TimedOut):  # no knowledge, so never remembered
            yield question, Verdict(Status.TIMED_OUT, question.answer, question.gold, str(reply))
        else:
            status, rule, forms = reply
            verdict = Verdict(Status(status), question.answer, question.gold, rule, forms and (forms[0], forms[1]))
            yield question, _MEMORY.put(question, verdict)


class _Memory:
    """Two generations of decided comparisons: when the young one is full it becomes the old one. No step needs a lock."""

    def __init__(self) -> None:
        self.young: dict[Question, Verdict] = {}
        self.old: dict[Question, Verdict] = {}

    def get(self, question: Question) -> Verdict | None:
        return self.young.get(question) or self.old.get(question)

    def put(self, question: Question, verdict: Verdict) -> Verdict:
        if len(question.gold) + len(question.answer) <= LONG:
            if len(self.young) >= REMEMBERED // 2:
                self.old, self.young = self.young, {}
            self.young[question] = verdict
        return verdict


_MEMORY = _Memory()
