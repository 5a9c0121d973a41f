"""``rftt check FILE.jsonl --output OUT.jsonl`` judges pairs of gold and response; ``rftt check --explain GOLD RESPONSE`` one."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rftt_lightning.answers import verify, verify_many
from rftt_lightning.app.command import Parser, refuse_malformed
from rftt_lightning.core.contracts import Status, UserError, Verdict
from rftt_lightning.search.problems import read_jsonl


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
    parser.add_argument("--output", type=str | None, help="where to write each line with verdict and rule added")
    parser.add_argument("--explain", type=str, nargs=2, metavar=("GOLD", "RESPONSE"), help="judge one pair and say why")
    parser.add_argument("--kind", type=str | None, help="what responses are: answer, response, or null to find out")
    parser.add_argument("--workers", type=int, default=2, help="prover processes at work at the same time")
    options = parser.parse_args(args)
    if options.workers < 1:
        raise UserError(f"workers is {options.workers}; it must be at least 1")
    if options.explain:
        gold, response = options.explain
        print(explain(verify(gold, response, kind=options.kind)))
        return 0
    if not options.get("file"):
        raise UserError("nothing to check; give a JSONL file, or --explain GOLD RESPONSE")
    return check_file(options.file, options.output, options.kind, options.workers)


def explain(verdict: Verdict) -> str:
    left, right = verdict.forms or ("", "")
    lines = [
        f"verdict   {verdict.status}",
        f"rule      {verdict.rule}",
        f"gold      {verdict.gold}",
        f"answer    {verdict.answer}",
    ]
    return "\n".join(lines + [f"compared  {left}  with  {right}"] * bool(verdict.forms))


def check_file(path: str, output: str | None, kind: str | None = None, workers: int = 2) -> int:
    """Judge every line; print how many of each verdict; write the lines with ``verdict``, ``rule`` and ``answer``."""
    rows = []
    for place, row in read_jsonl(path):
        missing = {"gold", "response"} - row.keys()
        if missing:
            raise UserError(f"{place}: no field {' and '.join(sorted(missing))}; each line needs gold and response")
        rows.append(row)
    if not rows:
        raise UserError(f"{path} has no lines; each line needs gold and response")
    pairs = [(_text(row["gold"]) or "", _text(row["response"])) for row in rows]
    verdicts = verify_many(pairs, kind=kind, workers=workers)
    if output is not None:
        _write(output, rows, verdicts)
    counts = Counter(verdict.status for verdict in verdicts)
    print(f"{len(rows)} pairs: " + ", ".join(f"{counts[status]} {status}" for status in Status))
    return 0


def _text(value: Any) -> str | None:
    return None if value is None else str(value)


def _write(output: str, rows: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict]) -> None:
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        with open(output, "w", encoding="utf-8") as file:
            for row, verdict in zip(rows, verdicts, strict=True):
                added = {"verdict": str(verdict.status), "rule": verdict.rule, "answer": verdict.answer}
                file.write(json.dumps({**row, **added}, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {output!r}: {error.strerror}; choose a writable path") from error
