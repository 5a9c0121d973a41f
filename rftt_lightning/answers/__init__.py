"""Answer checking, usable alone: ``verify(gold, response) -> Verdict``. No torch; sympy runs in workers that can be killed."""

from rftt_lightning.answers.checker import verify, verify_many
from rftt_lightning.answers.extract import extract

__all__ = ["extract", "verify", "verify_many"]
