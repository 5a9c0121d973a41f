"""``rftt diagnose``: what ails a run, from its metrics.jsonl alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from rich.markup import escape
from rich.table import Table

from rftt_lightning.app.command import CONFIG, Parser, paper, refuse_malformed
from rftt_lightning.core.contracts import UserError
from rftt_lightning.training.diagnostics import Diagnosis, Thresholds, diagnose, read_history

LASTS = 3
"""Exit status when a sickness lasts, which is neither a fault nor a mistake of the user's."""


def main(args: list[str]) -> int:
    refuse_malformed(args)
    text = "Name the sicknesses of an RL run, finished or under way: since when, on what evidence, what to try."
    parser = Parser(prog="rftt diagnose", description=f"{text} Exit status {LASTS} if one lasts, 0 if none does.")
    parser.add_argument("--config", action="config", help="YAML file with options; may be repeated, later ones win")
    parser.add_argument("run", type=str, help="folder of the run; its metrics.jsonl is read, nothing is written")
    parser.add_argument(
        "--thresholds",
        type=Thresholds | None,
        help="when a sickness counts as one; null takes those of the run's own Diagnostics, or the defaults",
    )
    options = parser.instantiate(parser.parse_args(args))
    folder = Path(options.run)
    history = read_history(folder / "metrics.jsonl")
    if not history:
        raise UserError(f"{folder / 'metrics.jsonl'} holds no step yet; wait until the run has done one")
    diagnosis = diagnose(history, options.thresholds or _configured(folder / CONFIG))
    print(_text(options.run, len(history), diagnosis), end="")
    return LASTS if diagnosis.lasting else 0


def _configured(path: Path) -> Thresholds:
    """The thresholds of the run's config."""
    if not path.is_file():
        return Thresholds()
    try:
        config: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
        for callback in config["trainer"]["callbacks"] or []:
            if callback["class_path"].endswith(".Diagnostics"):
                return Thresholds(**(callback.get("init_args") or {}).get("thresholds") or {})
    except (yaml.YAMLError, KeyError, TypeError, AttributeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no config of rftt rl: {error}; give --thresholds") from error
    return Thresholds()


def _text(run: str, steps: int, diagnosis: Diagnosis) -> str:
    console = paper()
    lasting, over = diagnosis.lasting, [alarm for alarm in diagnosis.alarms if alarm.until is not None]
    console.print(escape(f"{run}: {steps} steps, alarms: {len(lasting)} last, {len(over)} over"), highlight=False)
    if diagnosis.alarms:
        table = Table("sickness", "steps", "evidence", "what to try", show_lines=True)
        for alarm in (*lasting, *over):
            until = "" if alarm.until is None else alarm.until - 1
            table.add_row(alarm.name, f"{alarm.since}–{until}", escape(alarm.finding), escape(alarm.advice))
        console.print(table)
    if steps < 2 * diagnosis.limits.window:
        console.print(
            f"too short to compare with its start (needs {2 * diagnosis.limits.window} steps)", highlight=False
        )
    if unseen := diagnosis.unseen():
        console.print(
            f"not looked for, because a metric was not measured: {', '.join(unseen)}", highlight=False, soft_wrap=True
        )
    return console.export_text()
