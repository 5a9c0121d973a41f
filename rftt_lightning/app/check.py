"""``rftt check FILE.jsonl --output OUT.jsonl`` judges pairs of gold and response; ``rftt check --explain GOLD RESPONSE`` one."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

from rich.console import Console
from rich.progress import track

from rftt_lightning.answers import verify, verify_many
from rftt_lightning.answers.second import second_opinions
from rftt_lightning.app.command import Parser, refuse_malformed
from rftt_lightning.core.contracts import Status, UserError, Verdict
from rftt_lightning.search.problems import read_jsonl

CHUNK = 2000
"""Lines that are judged, and then written, together."""


def main(args: list[str]) -> int:
    refuse_malformed(args)
    parser = Parser(prog="rftt check", description="Judge answers: field gold against field response of each line.")
    parser.add_argument("--config", action="config", help="YAML file with options; may be repeated, later ones win")
    parser.add_argument(
        "file",
        nargs="?",
        default=argparse.SUPPRESS,  # any other default hides what a config says
        help="JSONL with the fields gold and response; other fields are carried through",
    )
    parser.add_argument(
        "--output", type=str | None, help="where to write each line with verdict, rule and answer added"
    )
    parser.add_argument("--explain", type=str, nargs=2, metavar=("GOLD", "RESPONSE"), help="judge one pair and say why")
    parser.add_argument("--kind", type=str | None, help="what responses are: answer, response, or null to find out")
    parser.add_argument("--workers", type=int, default=2, help="processes at work at the same time")
    parser.add_argument("--second", type=str | None, help="also ask another checker: math_verify")
    parser.add_argument("--disagreements", type=str | None, help="where to write the lines on which the second differs")
    args, pair = _explained(args)
    options = parser.parse_args(args)
    pair = pair or (options.explain and tuple(options.explain))
    if not isinstance(options.workers, int) or options.workers < 1:
        raise UserError(f"workers is {options.workers}; it must be at least 1")
    if options.disagreements and not options.second:
        raise UserError("disagreements with whom? give --second math_verify, too")
    if (
        options.output
        and options.disagreements
        and Path(options.output).absolute() == Path(options.disagreements).absolute()
    ):
        raise UserError("output and disagreements are one file; give two")
    if pair:
        if options.get("file") or options.output or options.second:
            raise UserError("--explain judges one pair; leave out the file, --output and --second")
        print(explain(verify(*pair, kind=options.kind)))
        return 0
    if not options.get("file"):
        raise UserError("nothing to check; give a JSONL file, or --explain GOLD RESPONSE")
    return check_file(
        options.file, options.output, options.kind, options.workers, options.second, options.disagreements
    )


def _explained(args: list[str]) -> tuple[list[str], tuple[str, str] | None]:
    """The two texts after ``--explain``, and the other arguments: a parser would take -1/2 for an option."""
    if "--explain" not in args:
        return args, None
    place = args.index("--explain")
    texts = args[place + 1 : place + 3]
    if len(texts) < 2:
        raise UserError("--explain needs two texts: the gold answer and the response")
    return args[:place] + args[place + 3 :], (texts[0], texts[1])


def explain(verdict: Verdict) -> str:
    left, right = verdict.forms or ("", "")
    lines = [
        f"verdict   {verdict.status}",
        f"rule      {verdict.rule}",
        f"gold      {verdict.gold}",
        f"answer    {verdict.answer}",
    ]
    text = "\n".join(lines + [f"compared  {left}  with  {right}"] * bool(verdict.forms))
    return text.encode("utf-8", "backslashreplace").decode()


def check_file(
    path: str,
    output: str | None,
    kind: str | None = None,
    workers: int = 2,
    second: str | None = None,
    disagreements: str | None = None,
) -> int:
    """Judge every line; write the lines with ``verdict``, ``rule`` and ``answer``; print how many of each verdict.

    The output appears when it is whole; until then an older file of that name stays as it is.
    """
    total = sum(1 for _ in _pairs(path))  # before anything is judged: every line has its fields
    if not total:
        raise UserError(f"{path} has no lines; each line needs gold and response")
    rows, counts, seconds = _pairs(path), Counter[Status](), Counter[str]()
    with _writer(output) as out, _writer(disagreements) as differ:
        chunks = range(0, total, CHUNK)
        for _ in track(chunks, "checking", console=Console(stderr=True), disable=len(chunks) < 2, transient=True):
            chunk = list(islice(rows, CHUNK))
            pairs = [pair for _, pair in chunk]
            verdicts = verify_many(pairs, kind=kind, workers=workers)
            opinions = second_opinions(second, pairs) if second else None
            counts.update(verdict.status for verdict in verdicts)
            for number, ((row, _), verdict) in enumerate(zip(chunk, verdicts, strict=True)):
                line = {**row, "verdict": str(verdict.status), "rule": verdict.rule, "answer": verdict.answer}
                if opinions:
                    line[second] = str(opinions[number].status)
                    if opinions[number].right != verdict.right:
                        seconds["disagree"] += 1
                        _write(differ, line)
                _write(out, line)
    print(f"{total} pairs: " + ", ".join(f"{counts[status]} {status}" for status in Status))
    if second:
        where = f", written to {disagreements}" if disagreements else ""
        print(f"{second} disagrees on {seconds['disagree']} of {total}{where}")
    return 0


def _pairs(path: str) -> Iterator[tuple[dict[str, Any], tuple[str, str | None]]]:
    for place, row in read_jsonl(path):
        missing = {"gold", "response"} - row.keys()
        if missing:
            raise UserError(f"{place}: no field {' and '.join(sorted(missing))}; each line needs gold and response")
        yield dict(row), (_text(row["gold"], "gold", place) or "", _text(row["response"], "response", place))


def _text(value: Any, name: str, place: str) -> str | None:
    if isinstance(value, dict | list | bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise UserError(f"{place}: {name} is {value!r:.60}; give text or a number")
    return None if value is None else str(value)


@contextlib.contextmanager
def _writer(path: str | None) -> Iterator[BinaryIO | None]:
    """A file that replaces ``path`` when all is written, and leaves nothing behind otherwise."""
    if path is None:
        yield None
        return
    part = Path(f"{path}.part")
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        if Path(path).is_dir():
            raise IsADirectoryError(21, "Is a directory")
        with open(part, "wb") as file:
            yield file
        part.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path!r}: {error.strerror}; choose a writable path") from error
    finally:
        part.unlink(missing_ok=True) if part.parent.is_dir() else None


def _write(file: BinaryIO | None, line: dict[str, Any]) -> None:
    if file is not None:
        try:
            text = json.dumps(line, ensure_ascii=False).encode()
        except UnicodeEncodeError:  # lone surrogates are no UTF-8
            text = json.dumps(line).encode()
        file.write(text + b"\n")
