"""The inside of a worker: ``python -m rftt_lightning.answers.worker``, under limits, talking JSON lines.

A guardian imports sympy, tests itself on known pairs, and forks the process that judges; when that is killed or dies it
forks another, which takes milliseconds where a new start takes a second. Text never reaches sympy's parsers.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

from rftt_lightning.answers.decide import decide, read
from rftt_lightning.answers.equal import Prover, Unproven
from rftt_lightning.answers.memory import MEMORY
from rftt_lightning.answers.prover import Sympy
from rftt_lightning.core.contracts import Status, Verdict

Judge = Callable[..., Verdict | None]
TOGETHER = 0.02
"""Seconds after which cheap verdicts are sent."""

BYTES = 300 << 20
"""Address space of a worker, bytes."""

OUT_OF_MEMORY = 3
"""Exit status."""

KNOWN = [  # gold, answer, equal: one pair for each way to decide
    ("1,234", "1234", True), (r"\frac{1}{3}", "0.33", False), (r"\sqrt{8}", r"2\sqrt{2}", True), (r"\sqrt{8}", r"2\sqrt{3}", False),
    (r"\sin^2 x", r"1-\cos^2 x", True), ("(1,2)", "(2,1)", False), (r"\{1,2\}", "2, 1", True), ("x<3", r"(-\infty,3)", True),
    ("y=2x+1", "4x-2y+2=0", True), ("25\\%", "0.25", True), (r"\text{yes}", "no", False), (r"\frac{1}{\sqrt2}", "0.7071", False),
    (r"\sqrt{3+2\sqrt2}", r"1+\sqrt2", True), (r"\binom{n}{2}", r"\frac{n(n-1)}{2}", True), ("e^{i x}", r"\cos x+i\sin x", True),
]  # fmt: skip


def self_test() -> str:
    """What is judged wrongly here; empty if nothing is. Also fills sympy's caches for the forks."""
    for gold, answer, equal in KNOWN:
        verdict = decide(gold, answer, Sympy())
        if verdict.right != equal or verdict.status not in (Status.RIGHT, Status.WRONG):
            return f"{answer} for {gold} is {verdict.status} by {verdict.rule or 'no rule'}"
    return ""


def serve(judge: Judge, quick: Judge | None, memory: int, cause: str) -> None:
    """Judge requests until the caller closes the pipe. Verdicts of ``quick`` are sent together, the others one by one.

    A pair that takes more CPU seconds than its budget ends the process: SIGPROF is left to kill it, which also works inside C
    code. So a busy machine takes nothing from the budget, and what a killed caller left behind ends, too.
    """
    resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    _send({"judge": os.getpid(), "cause": cause})
    for line in sys.stdin:
        request, seconds, kind, *pairs = json.loads(line)
        reply, sent = [request], time.monotonic()
        for pair in pairs:
            verdict = quick(*pair, kind) if quick else None
            if verdict is None:
                reply = _sent(reply)  # what is decided is known, whatever becomes of this pair
                signal.setitimer(signal.ITIMER_PROF, seconds)
                try:
                    verdict = judge(*pair, kind)
                except MemoryError:
                    os._exit(OUT_OF_MEMORY)
                signal.setitimer(signal.ITIMER_PROF, 0)
            assert verdict is not None
            reply.append([verdict.status, verdict.answer, verdict.gold, verdict.rule, verdict.forms])
            if time.monotonic() - sent > TOGETHER:
                reply, sent = _sent(reply), time.monotonic()
        _sent(reply)


def _sent(reply: list[Any]) -> list[Any]:
    """Send the verdicts collected so far; what is left to collect them in."""
    if len(reply) > 1:
        _send(reply)
    return reply[:1]


def _send(message: Any) -> None:
    try:
        sys.stdout.write(json.dumps(message) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # nobody listens: the guardian, too, shall leave
        os._exit(0)


def guard(judge: Judge, fault: str, memory: int = BYTES, quick: Judge | None = None) -> int:
    """Fork processes that serve, one after the other, until one ends because the caller has gone. Does not return before."""
    if fault:
        _send({"broken": fault})
        return 1
    cause = ""
    while True:
        fork = os.fork()
        if fork == 0:
            serve(judge, quick, memory, cause)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(fork, 0)[1])
        if code == 0:
            return 0
        cause = {-signal.SIGPROF: "CPU time", OUT_OF_MEMORY: "memory"}.get(code, "worker died")


def judge(gold: str, response: str | None, kind: str | None) -> Verdict:
    return _judge(gold, response, kind, Sympy())


def quick(gold: str, response: str | None, kind: str | None) -> Verdict | None:
    """By cheap means, bounded as in the caller's process; None where they do not decide (or fail: then :func:`judge` fails)."""
    try:
        return _judge(gold, response, kind, Unproven())
    except Exception:  # noqa: BLE001
        return None


def _judge(gold: str, response: str | None, kind: str | None, prover: Prover) -> Verdict:
    question = read(gold, response, kind)
    if isinstance(question, Verdict):
        return question
    known = MEMORY.get(question)
    return known or MEMORY.put(question, decide(question.gold, question.answer, prover, question.loose))


def main() -> int:
    sys.setrecursionlimit(3000)
    return guard(judge, self_test(), quick=quick)


if __name__ == "__main__":
    sys.exit(main())
