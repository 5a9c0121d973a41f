"""A second opinion, for triage: Math-Verify (its own extraction, parser and comparison), in workers like ours.

Its limits need SIGALRM and the main thread, so none of them is used; a worker that overruns is killed. Install it with
``pip install math-verify``.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence

from rftt_lightning.answers import worker
from rftt_lightning.answers.extract import extract
from rftt_lightning.answers.pool import SECOND, TimedOut
from rftt_lightning.core.contracts import Status, UserError, Verdict

SECONDS = 5.0
MEMORY = 1 << 30
"""Address space, bytes; antlr needs more than our own reader."""
NAMES = ("math_verify",)


def second_opinions(name: str, pairs: Sequence[tuple[str, str | None]], seconds: float = SECONDS) -> list[Verdict]:
    """Verdicts of another checker (right, wrong, no_answer, unparsable_gold or timed_out), in order.

    Raises :class:`UserError` for a name that is not in :data:`NAMES` and for a package that is not installed.
    """
    if name not in NAMES:
        raise UserError(f"second is {name!r}; use {' or '.join(NAMES)}")
    if importlib.util.find_spec(name) is None:
        raise UserError("math-verify is not installed; pip install math-verify")
    asked = iter([(gold, response or "") for gold, response in pairs])
    return [
        Verdict(Status.TIMED_OUT, gold=gold, rule=f"{name}: {reply}")
        if isinstance(reply, TimedOut)
        else Verdict(Status(reply[0]), gold=gold, rule=reply[3])
        for (gold, _), reply in SECOND.judge(asked, None, seconds)
    ]


def judge(gold: str, response: str | None, kind: str | None) -> Verdict:
    """Runs in a worker only."""
    response = response or ""
    import math_verify  # an optional package

    try:
        wanted = math_verify.parse(rf"\boxed{{{gold}}}", parsing_timeout=None)
        bare = response.strip() == extract(response)
        found = math_verify.parse(rf"\boxed{{{response}}}" if bare else response, parsing_timeout=None)
        if not wanted:
            return Verdict(Status.UNPARSABLE_GOLD, rule="math_verify")
        if not found:
            return Verdict(Status.NO_ANSWER, rule="math_verify")
        right = math_verify.verify(wanted, found, timeout_seconds=None)
    except Exception as error:  # noqa: BLE001  another's checker may raise anything
        return Verdict(Status.WRONG, rule=f"math_verify: {type(error).__name__}")
    return Verdict(Status.RIGHT if right else Status.WRONG, rule="math_verify")


if __name__ == "__main__":
    judge("1", "2", None)  # import and warm up before the first question
    sys.exit(worker.guard(judge, "", MEMORY))
