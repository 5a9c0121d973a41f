"""The real-input run of ``experiments/gsm8k-smoke`` on six problems of our own in GSM8K's format."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
THINGS = ("pens", "apples", "stamps", "marbles", "books", "cards")


def write_problems(path: Path) -> None:
    with path.open("w") as file:
        for i, thing in enumerate(THINGS):
            boxes, each, lost = 3 + i, 12 + i, 5 + 2 * i
            total = boxes * each
            question = (
                f"Mary buys {boxes} boxes with {each} {thing} in each. She loses {lost} of them. How many are left?"
            )
            answer = (
                f"She buys {boxes}*{each}=<<{boxes}*{each}={total}>>{total} {thing}.\n"
                f"{total}-{lost}=<<{total}-{lost}={total - lost}>>{total - lost} are left.\n#### {total - lost}"
            )
            file.write(json.dumps({"question": question, "answer": answer, "idx": i}) + "\n")


@pytest.mark.slow
def test_the_whole_method_runs_on_real_input(tmp_path):
    problems, out = tmp_path / "problems.jsonl", tmp_path / "out"
    write_problems(problems)
    script = ROOT / "experiments" / "gsm8k-smoke" / "run.py"
    command = [sys.executable, str(script), str(problems), "--limit", "6", "--out", str(out), "--threads", "1"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    account = json.loads((out / "account.json").read_text())
    assert account["refusal"].count("\n") == 0 and "overlap" in account["refusal"]
    for stage in ("search", "rl", "greedy", "rollouts"):
        assert sum(account[stage]["verdicts"].values()) == account[stage]["rollouts"] > 0
        assert account[stage].get("trees", 6) == 6
