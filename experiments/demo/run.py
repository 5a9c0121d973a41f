"""The whole method on the embedded world, from the shipped base to the table: ``make demo``.

Every stage is an ordinary ``rftt`` command (its line is printed by ``--list``); this script only orders them, runs what can
run side by side, skips what is done, and gathers the table. Stages that train or search for long continue where they
were, so a demo may be interrupted at any moment.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.live import Live
from rich.table import Table

from rftt_lightning.core.contracts import UserError
from rftt_lightning.search.vote import Accuracy

ARMS = {
    "base": "base model, chain of thought",
    "sft": "SFT warm-up",
    "rl": "RL (tree search)",
    "rl_masked": "RL, verify and refine masked",
    "rl_no_warmup": "RL without warm-up",
    "sampling": "RL, plain sampling, no tree",
}


@dataclass(frozen=True)
class Stage:
    """One ``rftt`` command; ``needs`` are the stages whose files it reads."""

    name: str
    args: tuple[str, ...]
    needs: tuple[str, ...] = ()

    @property
    def digest(self) -> str:
        """Of the command line and the config that it names."""
        config = Path(self.args[self.args.index("--config") + 1]).read_bytes()
        return hashlib.sha256("\0".join(self.args).encode() + config).hexdigest()[:16]


def stages(out: Path, seed: int, world: Path, short: int) -> list[Stage]:
    """The demo as a list of commands, the longest chain first. ``short``: steps of RL without warm-up."""

    def command(name: str, *args: object, config: str = "") -> tuple[str, ...]:
        return (*name.split(), "--config", str(world / f"{config or name.split()[0]}.yaml"), *map(str, args))

    def fit(arm: str, start: object, needs: tuple[str, ...], *args: object) -> Stage:
        where = ("--model.model", start, "--trainer.out", out / arm, "--trainer.seed", seed)
        return Stage(arm, command("rl fit", *where, *args), needs)

    def rate(arm: str, model: object, needs: tuple[str, ...], *args: object) -> Stage:
        where = ("--backend.init_args.model", model, "--out", out / f"evaluate_{arm}", "--seed", seed)
        return Stage(f"evaluate_{arm}", command("evaluate", *where, *args), needs)

    start = yaml.safe_load((world / "search.yaml").read_text())["backend"]["init_args"]["model"]
    alone, seeded = ("--search", "null"), ("--seed_everything", seed)
    sft, rl = out / "sft" / "hf", out / "rl" / "hf"
    base = command("evaluate", "--out", out / "evaluate_base", "--seed", seed, config="evaluate_cot")
    return [
        Stage("search", command("search", "--out", out / "search", "--seed", seed)),
        Stage(
            "curate",
            command("curate", "--trees", out / "search", "--out", out / "curate", "--curator.seed", seed),
            ("search",),
        ),
        Stage("sft", command("sft fit", "--data.folder", out / "curate", "--out", out / "sft", *seeded), ("curate",)),
        fit("rl", sft, ("sft",)),
        rate("rl", rl, ("rl",)),
        rate("rl_masked", rl, ("rl",), "--backend.init_args.mask", '["verify","refine"]', *alone),
        fit("rl_no_warmup", start, (), "--trainer.max_steps", short),
        rate("rl_no_warmup", out / "rl_no_warmup" / "hf", ("rl_no_warmup",), *alone),
        Stage("evaluate_base", base),
        rate("sft", sft, ("sft",), *alone),
        fit("sampling", sft, ("sft",), "--trainer.expander.init_args.mode", "sample", "--trainer.parallel", 8),
        rate("sampling", out / "sampling" / "hf", ("sampling",), *alone),
    ]


class Demo:
    """Runs stages whose needs are met, ``lanes`` at a time, one thread each. What was run, whether it is done and its seconds,
    interrupted runs included, are kept in a file."""

    def __init__(self, out: Path, stages: list[Stage], lanes: int) -> None:
        self.out, self.stages, self.lanes = out, stages, lanes
        self.record = out / "stages.json"
        known = json.loads(self.record.read_text()) if self.record.exists() else {}
        self.seconds: dict[str, float] = known.get("seconds", {})
        self.total: float = known.get("total", 0.0)
        self.done: dict[str, str] = known.get("done", {})
        self.began: dict[str, float] = {}
        for stage in stages:
            if self.done.get(stage.name, stage.digest) != stage.digest:
                raise UserError(f"stage {stage.name} of {out} had other settings; give another --out, or delete it")
        (out / "logs").mkdir(parents=True, exist_ok=True)

    def run(self) -> None:
        running: dict[Future[None], Stage] = {}
        with (
            ThreadPoolExecutor(self.lanes) as pool,
            Live(self.picture(), refresh_per_second=1, get_renderable=self.picture),
        ):
            start = time.monotonic()
            try:
                while len(self.done) < len(self.stages):
                    for stage in self.ready([s.name for s in running.values()])[: self.lanes - len(running)]:
                        self.began[stage.name] = time.monotonic()
                        running[pool.submit(self.execute, stage)] = stage
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        future.result()
                        stage = running.pop(future)
                        self.done[stage.name] = stage.digest
                        start = self.note([stage], start)
                        if not sys.stdout.isatty():  # where no picture is drawn
                            print(f"{stage.name}: done in {self.seconds[stage.name]:.0f} s", flush=True)
            finally:
                self.note(running.values(), start)

    def note(self, stages: Iterable[Stage], start: float) -> float:
        """Write down the seconds of stages that have ended or are interrupted, and those of all since ``start``; returns now."""
        now = time.monotonic()
        for stage in stages:
            self.seconds[stage.name] = round(self.spent(stage.name), 1)
            del self.began[stage.name]
        self.total = round(self.total + now - start, 1)
        known = {"done": self.done, "seconds": self.seconds, "total": self.total}
        self.record.write_text(json.dumps(known, indent=2) + "\n")
        return now

    def spent(self, name: str) -> float:
        now = time.monotonic()
        return self.seconds.get(name, 0.0) + now - self.began.get(name, now)

    def ready(self, running: list[str]) -> list[Stage]:
        waiting = [s for s in self.stages if s.name not in self.done and s.name not in running]
        return [s for s in waiting if all(need in self.done for need in s.needs)]

    def execute(self, stage: Stage) -> None:
        log = self.log(stage)
        env = {**os.environ, "OMP_NUM_THREADS": str(max(1, 2 // self.lanes)), "COLUMNS": "110"}
        with log.open("w") as file:
            code = subprocess.call(
                [sys.executable, "-m", "rftt_lightning", *stage.args], stdout=file, stderr=file, env=env
            )
        if code:
            tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
            raise SystemExit(f"stage {stage.name} failed with exit status {code}; {log} ends:\n{tail}")

    def log(self, stage: Stage) -> Path:
        return self.out / "logs" / f"{stage.name}.log"

    def picture(self) -> Table:
        table = Table("stage", "seconds", "", title="rftt demo", width=110)
        for stage in self.stages:
            name = stage.name
            if name in self.done:
                table.add_row(name, f"{self.seconds[name]:.0f}", "[green]done")
            elif name in self.began:
                table.add_row(name, f"{self.spent(name):.0f}", last_line(self.log(stage)))
            else:
                table.add_row(name, "", "[dim]waiting")
        return table


def last_line(log: Path) -> str:
    """The newest line of a log, progress bars included."""
    if not log.exists():
        return ""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:80] for line in reversed(lines) if line.strip()), "")


def gather(out: Path, demo: Demo) -> dict[str, Any]:
    """``results.json`` of the whole demo from those of its evaluations."""
    parts = {arm: json.loads((out / f"evaluate_{arm}" / "results.json").read_text()) for arm in ARMS}
    results: dict[str, Any] = {arm: part["greedy"] for arm, part in parts.items()}
    results["rollouts"] = {n: row["majority"] for n, row in parts["rl"]["rollouts"].items()}
    results["seconds"] = {**demo.seconds, "total": demo.total}
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    return results


def show(results: dict[str, Any], out: Path, short: int) -> None:
    console = Console(width=118)
    table = Table(title=f"{results['base']['n']} fresh test problems, greedy answers, accuracy in % [95 % interval]")
    console.print()
    for column in ("", "accuracy", "tokens", "verify", "refine", "wrong→right", "right→wrong"):
        table.add_column(column, justify="left" if not column else "right")
    for arm, title in ARMS.items():
        row = results[arm]
        use = row["functional_tokens_per_answer"]
        cells = f"{row['tokens_per_problem']:.0f}", f"{use['verify']:.2f}", f"{use['refine']:.2f}"
        repairs = f"{100 * row['wrong_to_right']:.1f} %", f"{100 * row['right_to_wrong']:.1f} %"
        table.add_row(title + (" *" if arm == "rl_no_warmup" else ""), _cell(row), *cells, *repairs)
    console.print(table)
    console.print(f"* trained for {short} steps only, to keep the demo short")
    curve = Table(title="RL model, majority vote of n rollouts by tree search")
    for n in results["rollouts"]:
        curve.add_column(f"n = {n}", justify="right")
    curve.add_row(*(_cell(row) for row in results["rollouts"].values()))
    console.print(curve)
    for name, path in {
        "results": out / "results.json",
        "curve": out / "evaluate_rl" / "accuracy.png",
        "trees": out / "search",
        "trajectories": out / "curate",
        "models": f"{out / 'sft' / 'hf'}, {out / 'rl' / 'hf'}",
        "logs": out / "logs",
        "curves": f"tensorboard --logdir {out}",
    }.items():
        console.print(f"{name:>13}: {path}", highlight=False)
    seconds = results["seconds"]
    console.print(f"{'seconds':>13}: " + ", ".join(f"{k} {v:.0f}" for k, v in seconds.items()), highlight=False)


def _cell(row: dict[str, Any]) -> str:
    return str(Accuracy(row["accuracy"], row["low"], row["high"], row["n"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/demo"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--world", type=Path, default=Path("configs/tiny"), help="folder with the configs")
    parser.add_argument("--short", type=int, default=20, help="steps of RL without warm-up")
    parser.add_argument("--lanes", type=int, default=2, help="stages side by side, one thread each")
    parser.add_argument("--list", action="store_true", help="print the commands and stop")
    options = parser.parse_args()
    plan = stages(options.out, options.seed, options.world, options.short)
    if options.list:
        print("\n".join(shlex.join(["rftt", *stage.args]) for stage in plan))
        return
    try:
        demo = Demo(options.out, plan, options.lanes)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    demo.run()
    show(gather(options.out, demo), options.out, options.short)


if __name__ == "__main__":
    main()
