"""What every command that is a typed function shares: its parser, its config, its errors."""

from __future__ import annotations

import io
import itertools
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser
from rich.console import Console

from rftt_lightning.core.contracts import UserError

CONFIG = "config.yaml"
"""Name of the saved config in a run's output folder."""


class Parser(ArgumentParser):
    """A parser whose errors are :class:`UserError` s of one line instead of a usage text and an exit."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise UserError(one_line(message)) from ex

    def instantiate(self, *args: Any, **kwargs: Any) -> Any:
        try:
            return super().instantiate(*args, **kwargs)
        except ValueError as error:
            if isinstance(error.__cause__, UserError):  # what an optional class refused, in a message on its types
                raise error.__cause__ from None
            raise


def one_line(message: object) -> str:
    """A message without line breaks. jsonargparse nests causes as indented lines, which ``;`` joins here.

    >>> one_line("Parser key 'a':\\n  Expected a <class 'int'>")
    "Parser key 'a': Expected a <class 'int'>"
    """
    lines = [" ".join(line.split()) for line in str(message).splitlines()]
    return "; ".join(line for line in lines if line).replace(":; ", ": ").replace(".; ", "; ")


def run_command(function: Callable[..., Any], args: Sequence[str], prog: str) -> int:
    """Run a typed function as the command ``prog`` with ``args``; returns 0, raises what the function raises.

    Its parameters become options by their annotations and defaults, their help comes from the ``Args:`` of its docstring.
    A parameter annotated with a class (``source: ProblemSource``) takes ``class_path`` and ``init_args`` of any subclass, or a
    YAML file that holds them (``--source configs/data/gsm8k.yaml``), and reaches the function as an instance. ``--config``
    reads YAML files (later ones and options win), ``--print_config`` prints the resulting one. Paths are plain strings
    relative to the working directory, so a config means the same wherever it lies.

    If the function has a parameter ``out`` (a folder), the parsed config is saved there as ``config.yaml`` before it
    starts; ``prog --config out/config.yaml`` repeats the run. A run that is refused leaves the earlier config as it was. Raises
    :class:`UserError` for options that are unknown, missing or of a wrong type, and for an ``out`` that cannot be written.
    """
    refuse_malformed(args)
    parser = Parser(prog=prog, description=(function.__doc__ or "").strip().split("\n\n")[0])
    parser.add_argument("--config", action="config", help="YAML file with options; may be repeated, later ones win")
    parser.add_function_arguments(function, fail_untyped=True, sub_configs=True)
    config = parser.parse_args(list(args))
    settings = parser.instantiate(config)
    settings.pop("config", None)
    if "out" not in settings:
        function(**vars(settings))
        return 0
    saved = Path(settings.out) / CONFIG
    earlier = saved.read_text(encoding="utf-8") if saved.is_file() else None
    save_config(parser.dump(config, skip_unset=False), settings.out)
    try:
        function(**vars(settings))
    except UserError:
        if earlier is not None:
            save_config(earlier, settings.out)
        raise
    return 0


def refuse_malformed(args: Sequence[str]) -> None:
    """Raises :class:`UserError` that names the ``--config`` file which is no YAML (the parser's own message does not)."""
    for path in filter(os.path.isfile, named_configs(args)):
        try:
            yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no YAML: {one_line(error)}") from error


def named_configs(args: Sequence[str]) -> list[str]:
    """What follows ``--config`` (or ``-c``, as LightningCLI has it) in a command line.

    >>> named_configs(["rl", "fit", "--config", "a=1.yaml", "--config=b.yaml", "--trainer.out", "c"])
    ['a=1.yaml', 'b.yaml']
    """
    words = [part for word in args for part in (word.split("=", 1) if word.startswith("--") else [word])]
    return [path for word, path in itertools.pairwise(words) if word in ("--config", "-c")]


def save_config(text: str, folder: str | Path) -> None:
    """Write a config into an output folder, which is made if need be; an earlier one is replaced."""
    try:
        make_folder(folder)
        (Path(folder) / CONFIG).write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --out") from error


def make_folder(folder: str | Path, option: str = "--out") -> None:
    """Make the output folder that ``option`` names if need be. Raises :class:`UserError` if it cannot be made or written to,
    and for an empty name, which would be the working directory."""
    if not str(folder):
        raise UserError(f"{option} is empty; give a folder")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another {option}") from error
    if not os.access(folder, os.W_OK):
        raise UserError(f"cannot write to {folder}: Permission denied; choose another {option}")


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file, which is whole or as it was whenever the process is killed."""
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")
    temporary.replace(path)


@contextmanager
def interruptible(*kinds: signal.Signals) -> Iterator[None]:
    """Signals of these kinds become a KeyboardInterrupt; only the main thread may ask for that."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = [signal.signal(kind, signal.default_int_handler) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def paper() -> Console:
    """A console that shows nothing; what is printed to it is taken by ``export_text``."""
    return Console(width=140, record=True, file=io.StringIO())
