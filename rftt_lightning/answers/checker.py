"""``verify(gold, response) -> Verdict``: the one door through which every reward and every reported number passes."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

from rftt_lightning.answers.decide import decide, read
from rftt_lightning.answers.equal import Unproven
from rftt_lightning.answers.extract import TAIL
from rftt_lightning.answers.memory import MEMORY
from rftt_lightning.answers.pool import POOL, TimedOut
from rftt_lightning.core.contracts import Status, UserError, Verdict

SECONDS = 0.6
"""CPU seconds of one comparison (three times as many by the clock). Of 3,000 pairs of all forms two take more than half of it."""


def verify(gold: str, response: str | None, *, kind: str | None = None, seconds: float = SECONDS) -> Verdict:
    r"""Is ``response`` right, given the gold answer? Never raises on what a model wrote, runs none of it, and ends in time.

    ``kind`` says what ``response`` is: ``"response"`` a whole response, ``"answer"`` a bare final answer; None finds out.
    Usable from any thread and process; in an event loop use ``await asyncio.to_thread(verify, gold, response)``.

    >>> verify("1/2", r"So we get \boxed{0.5}.").status
    <Status.RIGHT: 'right'>
    """
    question = read(gold, response, kind)
    if isinstance(question, Verdict):
        return question
    verdict = MEMORY.get(question)
    if verdict is None:
        POOL.warm_up()
        try:
            verdict = decide(question.gold, question.answer, Unproven(), question.loose)
        except Exception:  # noqa: BLE001  NeedsProof; and a fault of ours, which in a worker is a verdict, and no end of a run
            ((_, verdict),) = _from_workers(iter([_pair(gold, response)]), kind, seconds)
        MEMORY.put(question, verdict)
    return verdict


def verify_many(
    pairs: Iterable[tuple[str, str | None]], *, kind: str | None = None, workers: int = 2, seconds: float = SECONDS
) -> list[Verdict]:
    """Verdicts of (gold, response) pairs in input order. Equal questions are decided once.

    With ``workers`` > 1 so many processes read and decide them; with 1 this process does, and asks a worker only for proofs.
    """
    if workers < 1:
        raise UserError(f"workers is {workers}; it must be at least 1")
    asked = [_pair(gold, response) for gold, response in pairs]
    found = {pair: verdict for pair in dict.fromkeys(asked) if (verdict := MEMORY.get((*pair, kind)))}
    unknown = [pair for pair in dict.fromkeys(asked) if pair not in found]
    if workers == 1 or len(unknown) < 2:
        found |= {pair: verify(*pair, kind=kind, seconds=seconds) for pair in unknown}
    else:
        read("", None, kind)  # refuses an unknown kind here, not in the workers
        shared, stop = iter(unknown), threading.Event()
        with ThreadPoolExecutor(workers) as threads:
            try:
                for part in threads.map(lambda _: list(_from_workers(shared, kind, seconds, stop)), range(workers)):
                    found |= {pair: MEMORY.put((*pair, kind), verdict) for pair, verdict in part}
            finally:
                stop.set()  # when interrupted: no thread goes on to its next pair
    return [found[pair] for pair in asked]


def _pair(gold: str, response: str | None) -> tuple[str, str | None]:
    """What is sent to workers: of a longer response only its end is read."""
    return gold or "", response and response[-TAIL - 1 :]


def forget() -> None:
    """Decide everything anew (for measurements)."""
    MEMORY.clear()


def _from_workers(
    pairs: Iterator[tuple[str, str | None]], kind: str | None, seconds: float, stop: threading.Event | None = None
) -> Iterator[tuple[tuple[str, str | None], Verdict]]:
    for pair, reply in POOL.judge(pairs, kind, seconds, stop):
        if isinstance(reply, TimedOut):
            asked = read(*pair, kind)
            yield pair, Verdict(Status.TIMED_OUT, asked.answer, asked.gold, str(reply))
        else:
            status, answer, gold, rule, forms = reply
            yield pair, Verdict(Status(status), answer, gold, rule, forms and (forms[0], forms[1]))
