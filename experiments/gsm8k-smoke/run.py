"""The whole method on real problems without real weights: search, curate, sft, rl, evaluate on a GSM8K file.

    python experiments/gsm8k-smoke/run.py path/to/gsm8k_test.jsonl

Every stage is the ordinary command with the ordinary config of Qwen2.5-7B-Instruct and a small overlay from this folder. Only
the model is not ordinary: its weights are random (``model.py``). The run asks whether anything crashes and whether every
verdict is accounted for, not how good the method is. See README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model import build

from rftt_lightning.core.contracts import Problem, ProblemSource, Step, Trajectory
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.search.problems import GSM8K
from rftt_lightning.search.store import read_trees, write_trajectories

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent.parent / "configs" / "qwen2.5-7b"


class Run:
    """Runs ``rftt`` commands on one problem file; ``out`` is the folder of all results."""

    def __init__(self, problems: Path, limit: int, out: Path, configs: Path, threads: int) -> None:
        self.path, self.out, self.configs = problems, out, configs
        self.env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        self.source = GSM8K(str(problems), limit=limit)

    def rftt(self, name: str, *args: object, expect: int = 0) -> str:
        """Run a command with the real model's config under this folder's overlay; what it said on stderr. Stops the whole run
        on another exit status than expected."""
        stage = name.split()[0]
        configs = ("--config", self.configs / f"{stage}.yaml", "--config", HERE / f"{stage}.yaml")
        command = [sys.executable, "-m", "rftt_lightning", *name.split(), *map(str, (*configs, *args))]
        print("$ rftt", *command[3:], flush=True)
        began = time.monotonic()
        done = subprocess.run(command, capture_output=True, text=True, env=self.env, check=False)
        print(f"  exit {done.returncode} after {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode != expect or "Traceback" in done.stderr:
            raise SystemExit(f"expected exit {expect}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
        return done.stderr

    def texts(self) -> list[str]:
        """Questions and worked solutions."""
        return [f"{row['question']}\n{row['answer']}" for _, row in self.rows()]

    def rows(self) -> list[tuple[Problem, dict[str, Any]]]:
        """Problems with their records in the file."""
        records = {row["question"]: row for row in map(json.loads, self.path.read_text(encoding="utf-8").splitlines())}
        return [(problem, records[problem.question]) for problem in self.source.problems()]

    def worked_solutions(self, folder: Path) -> None:
        """SFT data of this smoke run: the benchmark's own solutions as plain paths."""
        paths = [worked(problem, row["answer"], self.source) for problem, row in self.rows()]
        write_trajectories(folder, paths, {"from": f"worked solutions of {self.path}"})
        print(
            f"wrote {len(paths)} worked solutions of the benchmark as SFT paths to {folder}: not the method, see README.md"
        )


def worked(problem: Problem, solution: str, source: ProblemSource) -> Trajectory:
    """A solution in GSM8K's format as a path: a line a step, the last one the direct answer, then the output."""
    plain = re.sub(r"<<.*?>>", "", solution).split("####")[0]
    lines = [line.strip() for line in plain.splitlines() if line.strip()]
    tags = ["next_step"] * (len(lines) - 1) + ["direct_answer"]
    steps = (*map(Step, tags, lines), Step("output", source.output(problem.answer)))
    return Trajectory(problem, steps, (True,) * len(steps), "plain", {"from": "worked solution of the benchmark"})


# -- accounts ----------------------------------------------------------------------------------------------------------


def account(folder: Path, rows: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Counts of a store of trees. Every tree must be sound, every path legal under these rows of the token table, and
    the verdicts must sum to the rollouts."""
    trees = list(read_trees(folder))
    verdicts: Counter[str] = Counter()
    for tree in trees:
        tree.check()
        verdicts.update(score.verdict.status.value for _, score in tree.leaves)
        for node in range(1, len(tree)):
            if tree.tag(node) not in rows[tree.tag(tree.parent[node])]:
                raise SystemExit(f"{folder}: {tree.problem.id} has an illegal node {node} ({tree.tag(node)})")
    rollouts = sum(len(tree.leaves) for tree in trees)
    if sum(verdicts.values()) != rollouts:
        raise SystemExit(f"{folder}: {rollouts} rollouts, but verdicts {dict(verdicts)}")
    complete = sum(rollout.complete for tree in trees for rollout in tree.rollouts())
    return {"trees": len(trees), "rollouts": rollouts, "complete": complete, "verdicts": dict(verdicts)}


def account_rl(path: Path) -> dict[str, Any]:
    """The same of an RL run, from its ``metrics.jsonl``: in every step the verdicts must sum to the rollouts."""
    steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    verdicts: Counter[str] = Counter()
    for step in steps:
        found = {key.removeprefix("verdicts/"): int(n) for key, n in step.items() if key.startswith("verdicts/")}
        if sum(found.values()) != step["rollouts"]:
            raise SystemExit(f"{path}: step {step['step']} has {step['rollouts']} rollouts, but verdicts {found}")
        verdicts.update(found)
    return {"steps": len(steps), "rollouts": sum(verdicts.values()), "verdicts": dict(verdicts)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("problems", type=Path, help="a file in GSM8K's format")
    parser.add_argument("--limit", type=int, default=20, help="how many problems")
    parser.add_argument("--out", type=Path, default=Path("runs/gsm8k-smoke"))
    parser.add_argument("--configs", type=Path, default=CONFIGS, help="folder of the configs that are overlaid")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    began, out = time.monotonic(), options.out
    run = Run(options.problems, options.limit, out, options.configs, options.threads)
    build(run.texts(), out / "model")
    source = {"path": str(options.problems), "limit": options.limit}
    problems = [f"--source.init_args.{name}={value}" for name, value in source.items()]
    itself = json.dumps([{"class_path": "rftt_lightning.search.problems.GSM8K", "init_args": source}])

    search = (*problems, "--held_out", itself, "--backend.init_args.model", out / "model", "--out", out / "search")
    refusal = run.rftt("search", *search, expect=2).strip().splitlines()[-1]
    print(f"  refused: {refusal}")
    run.rftt("search", *search, "--allow_overlap", "true", "--overwrite", "true")
    curate = ("--trees", out / "search", "--backend.init_args.model", out / "model", "--out", out / "curate")
    run.rftt("curate", *problems, *curate)
    run.worked_solutions(out / "worked")
    run.rftt("sft fit", "--model.model", out / "model", "--data.folder", out / "worked", "--out", out / "sft")
    rl = [f"--data.{part}.init_args.path={options.problems}" for part in ("train", "validation")]
    rl += [f"--data.train.init_args.limit={options.limit}", "--data.allow_overlap=true", "--ckpt_path=none"]
    run.rftt("rl fit", "--model.model", out / "sft" / "hf", *rl, "--trainer.out", out / "rl")
    evaluate = ("--backend.init_args.model", out / "rl" / "hf", "--out", out / "evaluate", "--overwrite", "true")
    run.rftt("evaluate", *problems, *evaluate)

    table = TokenTable.from_yaml()
    accounts = {
        "refusal": refusal,
        "search": account(out / "search", table.prompted),
        "curate": json.loads((out / "curate" / "report.json").read_text(encoding="utf-8")),
        "rl": account_rl(out / "rl" / "metrics.jsonl"),
        "greedy": account(out / "evaluate" / "greedy", table.grammar),
        "rollouts": account(out / "evaluate" / "search", table.grammar),
        "seconds": round(time.monotonic() - began),
    }
    (out / "account.json").write_text(json.dumps(accounts, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(accounts, indent=2))


if __name__ == "__main__":
    main()
