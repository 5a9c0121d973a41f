"""The tables of a demo: ``python experiments/demo/table.py runs/demo``; written to results.json, too."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from rftt_lightning.search.vote import Accuracy

ARMS = {
    "base": "base model, chain of thought",
    "sft": "SFT warm-up",
    "rl": "RL (tree search)",
    "rl_masked": "RL, verify and refine masked",
    "rl_no_warmup": "RL without warm-up *",
    "sampling": "RL, plain sampling, no tree",
}


def gather(out: Path) -> dict[str, Any]:
    """For each seed the arms' greedy answers, and the RL model's majority of n rollouts."""
    seeds = sorted(out.glob("seed-*"), key=lambda folder: int(folder.name.removeprefix("seed-")))
    results: dict[str, Any] = {}
    for folder in seeds:
        parts = {}
        for arm in ARMS:
            place = out if arm == "base" else folder
            parts[arm] = json.loads((place / f"evaluate_{arm}" / "results.json").read_text())
        results[folder.name] = {arm: part["greedy"] for arm, part in parts.items()}
        results[folder.name]["rollouts"] = {n: row["majority"] for n, row in parts["rl"]["rollouts"].items()}
    return results


def show(results: dict[str, Any], out: Path) -> None:
    console = Console(width=118)
    for seed, arms in results.items():
        table = Table(
            title=f"{seed}: {arms['base']['n']} fresh test problems, greedy answers, accuracy in % [95 % interval]"
        )
        for column in ("", "accuracy", "tokens", "verify", "refine", "wrong→right", "right→wrong"):
            table.add_column(column, justify="left" if not column else "right")
        for arm, title in ARMS.items():
            row = arms[arm]
            use = row["functional_tokens_per_answer"]
            cells = f"{row['tokens_per_problem']:.0f}", f"{use['verify']:.2f}", f"{use['refine']:.2f}"
            repairs = f"{100 * row['wrong_to_right']:.1f} %", f"{100 * row['right_to_wrong']:.1f} %"
            table.add_row(title, cell(row), *cells, *repairs)
        console.print(table)
        curve = Table(title="RL model, majority vote of n rollouts by tree search")
        for n in arms["rollouts"]:
            curve.add_column(f"n = {n}", justify="right")
        curve.add_row(*map(cell, arms["rollouts"].values()))
        console.print(curve)
    console.print("* trained for a few steps only, to keep the demo short")
    first = out / next(iter(results))
    for name, path in {
        "results": out / "results.json",
        "curve": first / "evaluate_rl" / "accuracy.png",
        "trees": first / "search",
        "trajectories": first / "curate",
        "models": f"{first / 'sft' / 'hf'}, {first / 'rl' / 'hf'}",
        "logs": out / "logs",
        "curves": f"tensorboard --logdir {out}",
    }.items():
        console.print(f"{name:>13}: {path}", highlight=False)
    seconds = json.loads((out / "stages.json").read_text())["seconds"]
    console.print(f"{'seconds':>13}: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()), highlight=False)


def cell(row: dict[str, Any]) -> str:
    return str(Accuracy(row["accuracy"], row["low"], row["high"], row["n"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    results = gather(out)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    show(results, out)


if __name__ == "__main__":
    main()
