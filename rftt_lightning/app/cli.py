"""The command ``rftt``: a table of commands, each module imported when it is used, and the border at which errors become
one line."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from rftt_lightning import __version__
from rftt_lightning.core.contracts import UserError

COMMANDS = {
    "tokens": ("rftt_lightning.app.tokens", "functional tokens in a model's vocabulary: ids, norms, probabilities"),
    "search": ("rftt_lightning.app.search", "grow a tree for every problem of a source"),
    "curate": ("rftt_lightning.app.curate", "make annotated paths for SFT from trees"),
    "store": ("rftt_lightning.app.store", "list, show, export and merge what search and curate stored"),
    "sft": ("rftt_lightning.app.sft", "fine-tune a model on annotated paths"),
    "prm": ("rftt_lightning.app.prm", "fit a process reward model on trees, or serve one"),
    "rl": ("rftt_lightning.app.rl", "reinforcement learning by functional-token-guided tree search"),
    "diagnose": ("rftt_lightning.app.diagnose", "what ails an RL run: since when, on what evidence, what to try"),
    "evaluate": ("rftt_lightning.app.evaluate", "accuracy, greedy and with n rollouts, with intervals and costs"),
    "sweep": ("rftt_lightning.app.sweep", "run a plan of such commands over seeds, side by side, resumable"),
    "check": ("rftt_lightning.app.check", "judge answers against gold answers"),
}
"""Name -> (module with ``main(args)``, one line of help)."""

INTERRUPTED = 130


def main(args: Sequence[str] | None = None) -> int:
    """Run one command, that of the command line if ``args`` is None; returns the exit status: 0, 1 for a fault, 2 for a mistake of
    the user's, 3 for a sickness that ``rftt diagnose`` finds, 130 when interrupted."""
    if args is None:
        args = sys.argv[1:]
        if not sys.flags.safe_path:  # class_path finds what lies in the working directory, as with python -m
            sys.path.insert(0, "")
    args = list(args)
    try:
        return _run(args)
    except (UserError, argparse.ArgumentError) as error:
        return _complain(str(error), 2)
    except KeyboardInterrupt:
        return _complain("interrupted; long commands go on where they were when started again", INTERRUPTED)
    except BrokenPipeError:  # the reader of our output (`| head`) has left
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  the interpreter flushes it when it ends
        return 1
    except Exception as error:
        if os.environ.get("RFTT_DEBUG"):
            raise
        return _complain(f"fault: {type(error).__name__}: {error} (traceback in {_keep_traceback()})", 1)


def _run(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help"):
        print(_help())
        return 0
    if args[0] == "--version":
        print(f"rftt {__version__}")
        return 0
    if args[0] not in COMMANDS:
        raise UserError(f"unknown command {args[0]!r}; use one of {', '.join(COMMANDS)}")
    return import_module(COMMANDS[args[0]][0]).main(args[1:]) or 0


def _help() -> str:
    lines = [f"  {name:<10}{text}" for name, (_, text) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: rftt COMMAND [--config FILE …] [options]",
            "",
            "Reinforced Functional Token Tuning (arXiv 2502.13389).",
            "",
            *lines,
            "",
            "rftt COMMAND --help lists a command's options, --print_config prints its config. RFTT_DEBUG=1 shows tracebacks.",
        ]
    )


def _complain(message: str, status: int) -> int:
    print(f"rftt: {' '.join(message.split())}", file=sys.stderr)
    return status


def _keep_traceback() -> Path:
    path = Path(tempfile.gettempdir()) / f"rftt-fault-{os.getpid()}.txt"
    path.write_text(traceback.format_exc(), encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
