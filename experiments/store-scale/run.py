"""Do stores of a million nodes stay usable? Each operation runs in a process of its own: seconds, records, peak memory, bytes."""

from __future__ import annotations

import argparse
import json
import os
import random
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

from rftt_lightning.app.curate import curate
from rftt_lightning.app.store import main as store_command
from rftt_lightning.core.contracts import (
    QUESTION,
    Backend,
    Completion,
    Problem,
    ProblemSource,
    Request,
    Score,
    Segment,
    Status,
    Trajectory,
    Verdict,
)
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Plan, Tree
from rftt_lightning.search.curate import Curator
from rftt_lightning.search.store import Store, read_trajectories, read_trees, size, write_trajectories

RANKS, NODES, DEPTH = 4, 150, 6
"""Stores that are merged; nodes with a segment in a tree, at least; segments of a rollout."""
TABLE = TokenTable.from_yaml()
WORDS = tuple(f"word{i}" for i in range(300))
LAST = "direct_answer"


# -- what is stored ------------------------------------------------------------------------------------------------------


def problem(number: int) -> Problem:
    rng = random.Random(f"problem {number}")
    return Problem(f"synthetic/{number:06d}", " ".join(rng.choices(WORDS, k=60)), "7")


def single(value: float) -> float:
    """As a model's float32 reaches Python: digits that do not compress."""
    return struct.unpack("f", struct.pack("f", value))[0]


def plans(rng: random.Random, after: str, last: bool) -> list[Plan]:
    legal = [tag for tag in TABLE.legal(after) if tag not in (LAST, "output")]
    tags = [LAST, *legal] if last else rng.sample(legal, len(legal))
    weights = [rng.random() for _ in tags]
    return [Plan(tag, single(weight / sum(weights))) for tag, weight in zip(tags, weights, strict=True)]


def tree(number: int) -> Tree:
    """A tree at rest with :data:`NODES` written nodes, 8 to 32 tokens each, and those that were planned and never visited."""
    rng, grown = random.Random(number), Tree(problem(number), tuple(range(80)))
    grown.plan(0, plans(rng, QUESTION, last=False))
    while sum(segment is not None for segment in grown.segments) < NODES:
        node = grown.select(2.0)
        assert node is not None
        depth = len(grown.path(node))
        while True:
            tag, size, last = grown.tag(node), rng.randint(8, 32), depth >= DEPTH
            following = [] if last else plans(rng, tag, last=depth == DEPTH - 1)
            words = rng.choices(range(len(WORDS)), k=size)
            logprobs = tuple(single(-rng.expovariate(3)) for _ in words)
            priors = {plan.tag: plan.prior for plan in following}
            text, forced = " ".join(WORDS[w] for w in words), (2,) + (0,) * (size - 1)
            ids = tuple(100 * w + 7 for w in words)
            grown.fill(node, Segment(tag, ids, logprobs, forced, text, True, priors, number % 5))
            if last:
                break
            node, depth = grown.plan(node, following)[0], depth + 1
        status = rng.choices((Status.RIGHT, Status.WRONG, Status.NO_ANSWER), (5, 4, 1))[0]
        value, steps = float(status is Status.RIGHT), tuple(single(rng.random()) for _ in grown.path(node))
        grown.end(node, True)
        verdict = Verdict(status, "7", "7", "integer", ("7", "7"))
        grown.backup(node, Score(verdict, value, (*(0.0 for _ in steps[1:]), value), steps))
    return grown


class Synthetic(ProblemSource):
    """The problems of the trees."""

    def __init__(self, count: int) -> None:
        self.list = [problem(number) for number in range(count)]

    def problems(self) -> Sequence[Problem]:
        return self.list

    def judge(self, problem: Problem, response: str) -> Verdict:
        return Verdict(Status.RIGHT)


class Denies(Backend):
    """Finds every wrong branch wrong, at once: what is measured is curation itself."""

    tokens = TABLE

    def chat(self, messages: Sequence[object]) -> tuple[int, ...]:
        return (1,)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        said = Segment("verify", (1,), (0.0,), (0,), "Verdict: wrong", True)
        return [Completion((said,)) for _ in requests]


# -- operations: each returns (records, seconds) -------------------------------------------------------------------------


def timed(count: int, began: float) -> tuple[int, float]:
    return count, time.perf_counter() - began


def write(out: Path, trees: int) -> tuple[int, float]:
    """As :data:`RANKS` searches store them, without the making of the trees."""
    seconds = 0.0
    for rank in range(RANKS):
        store = Store(out / f"rank{rank}", "trees", {"seed": 0})
        for number in range(rank, trees, RANKS):
            grown = tree(number)
            began = time.perf_counter()
            store.add(grown.problem.id, grown.to_json())
            seconds += time.perf_counter() - began
        store.close()
    return trees, seconds


def command(*args: object) -> float:
    began = time.perf_counter()
    store_command(list(map(str, args)))
    return time.perf_counter() - began


def merge(out: Path, trees: int) -> tuple[int, float]:
    return trees, command("merge", out / "trees", *(out / f"rank{rank}" for rank in range(RANKS)))


def reopen(out: Path, trees: int) -> tuple[int, float]:
    began = time.perf_counter()
    store = Store(out / "trees", "trees", {"seed": 0})
    store.close()
    return timed(len(store.done), began)


def list_all(out: Path, trees: int) -> tuple[int, float]:
    return trees, command("list", out / "trees")


def export_some(out: Path, trees: int) -> tuple[int, float]:
    some = ("--verdict", "right", "--uses", "verify", "--lacks", "clarify", "--min_version", 1)
    return trees, command("export", out / "trees", "--out", out / "some.jsonl", *some)


def export_all(out: Path, trees: int) -> tuple[int, float]:
    return trees, command("export", out / "trees", "--out", out / "all.jsonl")


def read(out: Path, trees: int) -> tuple[int, float]:
    began = time.perf_counter()
    return timed(sum(1 for _ in read_trees(out / "trees")), began)


def curate_all(out: Path, trees: int) -> tuple[int, float]:
    (out / "curated").mkdir()
    source, began = Synthetic(trees), time.perf_counter()
    curate(str(out / "trees"), source, Denies(), Curator(), str(out / "curated"))
    return timed(trees, began)


def write_paths(out: Path, trees: int) -> tuple[int, float]:
    """Every rollout as a trajectory: more than curation keeps, for what follows."""

    def paths() -> Iterator[Trajectory]:
        for grown in read_trees(out / "trees"):
            for rollout in grown.rollouts():
                learned = (True,) * len(rollout.steps)
                yield Trajectory(rollout.problem, rollout.steps, learned, "plain", {"correct": list(rollout.nodes)})

    began = time.perf_counter()
    write_trajectories(out / "paths", paths(), {})
    return timed(size(out / "paths", "trajectories"), began)


def read_paths(out: Path, trees: int) -> tuple[int, float]:
    began = time.perf_counter()
    return timed(sum(1 for _ in read_trajectories(out / "paths")), began)


def load(out: Path, trees: int) -> tuple[int, float]:
    """Until a :class:`TreeDataModule` gives its first batches."""
    from rftt_lightning.policy.vocab import add_functional_tokens
    from rftt_lightning.tiny.model import build_model, build_tokenizer
    from rftt_lightning.training.data import TreeDataModule

    tokenizer = build_tokenizer(WORDS)
    add_functional_tokens(build_model(tokenizer, hidden=8, layers=1), tokenizer, TABLE)
    module = SimpleNamespace(tokenizer=tokenizer, table=TABLE)
    count, began = size(out / "paths", "trajectories"), time.perf_counter()
    data = TreeDataModule(str(out / "paths"), batch_size=16)
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1, accumulate_grad_batches=1)
    data.setup("fit")
    batches = [next(iter(loader)) for loader in (data.train_dataloader(), data.val_dataloader())]
    assert all(batch.denominator > 0 for batch in batches)
    return timed(count, began)


OPERATIONS = {
    "write trees": write,
    "merge 4 stores": merge,
    "open to go on": reopen,
    "list": list_all,
    "export, filtered": export_some,
    "export all rollouts": export_all,
    "read trees": read,
    "curate": curate_all,
    "write trajectories": write_paths,
    "read trajectories": read_paths,
    "load TreeDataModule": load,
}


# -- measuring -----------------------------------------------------------------------------------------------------------


def measure(name: str, out: Path, trees: int) -> dict[str, float]:
    args = [sys.executable, __file__, "--out", str(out), "--trees", str(trees), "--operation", name]
    process = subprocess.Popen(args, stdout=subprocess.PIPE, text=True)
    assert process.stdout
    said = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{name} failed:\n{said}")
    records, seconds = json.loads(said.splitlines()[-1])
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    rate = round(records / seconds, 1)
    return {"records": records, "seconds": round(seconds, 1), "records_per_second": rate, "peak_MB": round(peak / 1e6)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("runs/store-scale"), help="a new folder")
    parser.add_argument("--trees", type=int, default=6700, help=f"of {NODES} written nodes each")
    parser.add_argument("--operation", choices=OPERATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.operation:
        print(json.dumps(OPERATIONS[options.operation](options.out, options.trees)))
        return
    results: dict[str, object] = {"trees": options.trees, "written_nodes_at_least": options.trees * NODES}
    for name in OPERATIONS:
        results[name] = figures = measure(name, options.out, options.trees)
        print(f"{name:<22}" + "  ".join(f"{key} {value:>10,}" for key, value in figures.items()), flush=True)
    plain = [len(json.dumps(tree(number).to_json(), separators=(",", ":"))) for number in range(20)]
    results["MB_plain"] = {"trees": round(sum(plain) / len(plain) * options.trees / 1e6)}
    results["MB_on_disk"] = {
        name: round(sum(path.stat().st_size for path in (options.out / name).iterdir()) / 1e6)
        for name in ("trees", "paths", "curated")
    }
    print(results["MB_plain"], results["MB_on_disk"])
    path = options.out / "results.json"
    path.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    print(f"results: {path}")


if __name__ == "__main__":
    main()
