"""The whole method on real problems without real weights: search, curate, sft, rl, evaluate on a GSM8K file.

    python experiments/gsm8k-smoke/run.py path/to/gsm8k_test.jsonl

Every stage is the ordinary command with the ordinary config of Qwen2.5-7B-Instruct and a small overlay from this folder. Only
the model is not ordinary: random weights (``model.py``). It asks whether anything crashes and whether every verdict is
accounted for, not how good the method is. See README.md.
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
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from model import build

from rftt_lightning.core.contracts import QUESTION, Problem, ProblemSource, Status, Step, Trajectory
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Tree
from rftt_lightning.search.problems import GSM8K, read_jsonl

HERE = Path(__file__).resolve().parent
CONFIGS = HERE.parent.parent / "configs" / "qwen2.5-7b"


def rftt(name: str, *args: object, threads: int, expect: int = 0) -> str:
    """Run ``rftt`` with the model's config and this folder's overlay; its output. Stops the script on another exit status."""
    stage = name.split()[0]
    configs = ("--config", CONFIGS / f"{stage}.yaml", "--config", HERE / f"{stage}.yaml")
    command = [sys.executable, "-m", "rftt_lightning", *name.split(), *map(str, (*configs, *args))]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    print("$ rftt", *command[3:], flush=True)
    began = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, env=env, check=False)
    print(f"  exit {done.returncode} after {time.monotonic() - began:.0f} s", flush=True)
    if done.returncode != expect or "Traceback" in done.stderr:
        raise SystemExit(f"expected exit {expect}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}")
    return done.stdout + done.stderr


def worked(problem: Problem, solution: str, source: ProblemSource) -> Trajectory:
    """The benchmark's own solution as a plain path: a line a step, the last one the direct answer, then the output.

    >>> # "2/2=<<2/2=1>>1 bolt\\nSo 2+1=<<2+1=3>>3\\n#### 3"  ->  next_step, direct_answer, output
    """
    lines = [line.strip() for line in re.sub(r"<<.*?>>", "", solution).split("####")[0].splitlines() if line.strip()]
    tags = ["next_step"] * (len(lines) - 1) + ["direct_answer"]
    steps = (*map(Step, tags, lines), Step("output", source.output(problem.answer)))
    return Trajectory(problem, steps, (True,) * len(steps), "plain", {"from": "the benchmark's worked solution"})
