"""How fast does tree search go, and what does it cost? The same trees grown by four engines, in one run.

Each engine lives in a process of its own and gets its problems in portions, one engine after the other, so that what else
the machine does hits all of them alike and the peak memory is that of one engine.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import multiprocessing
import pstats
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rftt_lightning.core.contracts import (
    QUESTION,
    Problem,
    ProblemSource,
    Reward,
    Rollout,
    Sampling,
    Score,
    Segment,
    Status,
    Verdict,
)
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Plan, Tree

TABLE = TokenTable.from_yaml()
BASE = "pkg:tiny/checkpoints/countdown"
WORDS = 4800
"""In the vocabulary of an untrained model."""

ENGINES = {
    "released": "one prompt a call, two calls a segment, nothing kept",
    "generate": "the same calls for many prompts at a time",
    "no reuse": "whole rollouts, rows join and leave a running batch; no prefix is kept",
    "ours": "the same, prefixes are read once",
}


@dataclass(frozen=True)
class Setup:
    """A model, its problems and how they are searched. ``problems`` of each portion by engine, counted from the first problem on
    for all engines. ``prompt`` words of a question, ``hidden`` and ``layers`` of an untrained model (0: the shipped tiny one)."""

    problems: Mapping[str, tuple[int, ...]]
    batch_size: int = 64
    concurrency: int = 128
    cache_gb: float = 4.0
    rollouts: int = 16
    hidden: int = 0
    layers: int = 0
    prompt: tuple[int, int] = (340, 420)
    search: Mapping[str, Any] = field(default_factory=dict)


GREEDY = Sampling(temperature=0.0, boundary="argmax", max_segment_tokens=64)
TINY = {"sampling": replace(GREEDY, max_segment_tokens=40), "max_depth": 30, "max_tokens": 180}
DRAWN = {**TINY, "sampling": Sampling(0.7, min_prior=0.02, max_segment_tokens=40), "children": "drawn", "width": 4}
UNTRAINED = {"sampling": GREEDY, "max_depth": 8, "max_tokens": 180}
SETUPS = {
    "tiny": Setup(
        {"released": (2, 2), "generate": (12,), "no reuse": (128,), "ours": (192,)},
        batch_size=128,
        concurrency=256,
        search=TINY,
    ),
    "11M": Setup(
        {"released": (1, 1), "generate": (3,), "no reuse": (6,), "ours": (96,)},
        hidden=256,
        layers=9,
        search=UNTRAINED,
    ),
    "50M": Setup(
        {"released": (1,), "generate": (2,), "no reuse": (3,), "ours": (20,)},
        batch_size=16,
        rollouts=6,
        hidden=512,
        layers=12,
        prompt=(200, 300),
        search=UNTRAINED,
    ),
    "occupancy": Setup({"ours": (200,)}, batch_size=112, concurrency=200, search=DRAWN),
}
"""The last one is searched as evaluation does it: contents and functional tokens drawn, the policy's confidence backed up."""


def shrunk(setup: Setup) -> Setup:
    """To see whether all works; its figures mean nothing."""
    problems = {engine: (8,) if engine == "ours" else (1, 1) for engine in setup.problems}
    return replace(setup, problems=problems, rollouts=4, batch_size=8)


# -- problems and their worth --------------------------------------------------------------------------------------------


class RandomWords(ProblemSource):
    """Questions without a meaning, for models that have none either."""

    def __init__(self, shortest: int, longest: int, count: int = 1000) -> None:
        self.shortest, self.longest, self.count = shortest, longest, count

    def problems(self) -> Sequence[Problem]:
        return [self._problem(number) for number in range(self.count)]

    def _problem(self, number: int) -> Problem:
        rng = random.Random(f"words {number}")
        words = [f"w{rng.randrange(WORDS)}" for _ in range(rng.randint(self.shortest, self.longest))]
        return Problem(f"words/{number}", " ".join(words))

    def judge(self, problem: Problem, response: str) -> Verdict:
        return Verdict(Status.NO_ANSWER)


class Chance(Reward):
    """Values as varied as a judge's and a function of the path's tokens alone, so that no rounding can change a tree."""

    uses_gold = False

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        return [Score(Verdict(Status.NO_ANSWER), self._value(r), (0.0,) * len(r.segments)) for r in rollouts]

    def _value(self, rollout: Rollout) -> float:
        tokens = [token for segment in rollout.segments for token in segment.tokens]
        return random.Random(str(tokens)).random()


def untrained(hidden: int, layers: int) -> tuple[Any, Any]:
    """A Qwen2 with random weights, and a word-level tokenizer. The rows of the closing tags are enlarged, else no segment would
    ever end; the large initial weights keep greedy decoding from going round in circles."""
    import torch
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rftt_lightning.policy.vocab import add_functional_tokens
    from rftt_lightning.tiny.model import build_tokenizer

    tokenizer = build_tokenizer([f"w{i}" for i in range(WORDS)])
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        initializer_range=0.1,
        tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    model = Qwen2ForCausalLM(config).eval()
    add_functional_tokens(model, tokenizer, TABLE, init="random")
    closes = [tokenizer.get_vocab()[token.close] for token in TABLE.tokens]
    with torch.no_grad():
        model.get_output_embeddings().weight[closes] *= 2.2
    return model, tokenizer


def teach(folder: Path, steps: int, threads: int) -> None:
    """The shipped base with functional tokens, taught for some seconds to use them, so that its trees look like those of SFT
    models: countdown's own random documents, which search needs no answer for."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from rftt_lightning.policy.vocab import add_functional_tokens, load
    from rftt_lightning.tiny.countdown import Countdown, document

    disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model, tokenizer = load(BASE, "float32")
    add_functional_tokens(model, tokenizer, TABLE)
    rng, problems = random.Random(0), Countdown("train", count=2000, start=1000).problems()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(steps):
        rows = []
        for problem in rng.sample(problems, 32):
            path = TABLE.render(document(problem, rng))
            chat = [{"role": "user", "content": problem.question}]
            prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
            rows.append((prompt, tokenizer(path, add_special_tokens=False)["input_ids"]))
        longest = max(len(prompt) + len(path) for prompt, path in rows)
        gaps = [longest - len(prompt) - len(path) for prompt, path in rows]
        ids = [p + a + [tokenizer.pad_token_id] * gap for (p, a), gap in zip(rows, gaps, strict=True)]
        labels = [[-100] * len(p) + a + [-100] * gap for (p, a), gap in zip(rows, gaps, strict=True)]
        optimizer.param_groups[0]["lr"] = 1e-3 * (1 - step / steps)
        loss = model(input_ids=torch.tensor(ids), labels=torch.tensor(labels)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    print(f"taught: loss {float(loss.detach()):.2f} after {steps} steps", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# -- one engine, in its process ------------------------------------------------------------------------------------------


def serve(pipe: Any, name: str, engine: str, setup: Setup, taught: str, threads: int) -> None:
    """Grow the trees of the problems (begin, count) that come through the pipe, until None comes."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    from rftt_lightning.policy.hf import HFBackend
    from rftt_lightning.policy.rewards import Confidence
    from rftt_lightning.policy.vocab import load
    from rftt_lightning.search.driver import Progress, grow
    from rftt_lightning.search.expand import TokenExpander
    from rftt_lightning.tiny.countdown import Countdown

    torch.set_num_threads(threads)
    disable_progress_bar()
    if setup.hidden:
        model, tokenizer = untrained(setup.hidden, setup.layers)
        source: ProblemSource = RandomWords(*setup.prompt)
    else:
        model, tokenizer = load(taught, "float32")
        source = Countdown("train", count=1000)
    if engine in ("released", "generate"):
        from engines import SegmentBackend

        backend = SegmentBackend(model, tokenizer, TABLE, 1 if engine == "released" else setup.batch_size)
    else:
        cache_gb = setup.cache_gb if engine == "ours" else 0.0
        backend = HFBackend.live(model, tokenizer, TABLE, setup.batch_size, cache_gb)
    reward = Confidence() if name == "occupancy" else Chance()
    problems = source.problems()

    def search(begin: int, count: int, rollouts: int) -> tuple[list[Tree], Progress, float]:
        expander, progress = TokenExpander(rollouts=rollouts, **setup.search), Progress()
        chosen, began = problems[begin : begin + count], time.perf_counter()
        grown = grow(chosen, expander, backend, reward, source, concurrency=setup.concurrency, progress=progress)
        trees = [tree for _, tree in sorted(grown)]
        return trees, progress, time.perf_counter() - began

    search(len(problems) - 1, 1, rollouts=1)  # what is made once: threads, tables, the pool
    idle = peak_bytes()
    pipe.send(sum(p.numel() for p in model.parameters()))
    while order := pipe.recv():
        usage, before = backend.usage, Counter(counters(backend.usage))
        trees, progress, wall = search(*order, setup.rollouts)
        after = Counter(counters(usage))
        after.subtract(before)
        pipe.send(
            {
                **after,
                "wall": wall,
                "rollouts": progress.rollouts,
                "generated": progress.tokens,
                "computed": progress.computed,
                "useful": progress.useful,
                "scoring": progress.score_seconds,
                **shape(trees),
                "peak": peak_bytes(),
                "idle": idle,
                "cache": usage.cache_bytes,
                "trees": {begin: written(tree) for begin, tree in enumerate(trees, order[0])},
            }
        )


def counters(usage: Any) -> dict[str, float]:
    seconds = {f"seconds {key}": value for key, value in usage.seconds.items()}
    return {"calls": usage.calls, "steps": usage.steps, "rows": usage.rows, "reused": usage.reused, **seconds}


def shape(trees: Sequence[Tree]) -> dict[str, float]:
    """Sums over what was written: ``context`` positions before a token, ``depth`` segments of a path."""
    nodes, context, depth = 0, 0.0, 0
    for tree in trees:
        for node, segment in enumerate(tree.segments):
            if segment is not None:
                nodes += 1
                end, size = len(tree.tokens(node)), len(segment.tokens)
                context += size * (end - size / 2)
        depth += sum(len(tree.path(leaf)) for leaf, _ in tree.leaves)
    return {"nodes": nodes, "planned": sum(map(len, trees)) - len(trees), "context": context, "depth": depth}


def written(tree: Tree) -> tuple[Any, ...]:
    """What two engines must agree on, by node: parents, tags, tokens, visits and values; and priors, up to rounding."""
    tokens = [segment and segment.tokens for segment in tree.segments]
    tags, priors = [plan.tag for plan in tree.plans], [plan.prior for plan in tree.plans]
    return tree.parent, tags, tokens, tree.visits, tree.values, priors


def peak_bytes() -> int:
    """Peak resident memory of this process, without what it inherited from its parent."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


# -- all engines of a model ----------------------------------------------------------------------------------------------


def measure(name: str, setup: Setup, taught: str, threads: int) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for engine in setup.problems:
        pipes[engine], there = context.Pipe()
        processes.append(context.Process(target=serve, args=(there, name, engine, setup, taught, threads), daemon=True))
        processes[-1].start()
        there.close()
    parameters = {pipe.recv() for pipe in pipes.values()}
    portions: dict[str, list[dict[str, Any]]] = {engine: [] for engine in setup.problems}
    for turn in range(max(map(len, setup.problems.values()))):
        for engine, counts in setup.problems.items():
            if turn >= len(counts):
                continue
            pipes[engine].send((sum(counts[:turn]), counts[turn]))
            found = pipes[engine].recv()
            portions[engine].append(found)
            print(f"{name:<10}{engine:<10}{found['wall']:6.1f} s {rate([found]):9,.0f} rollouts a minute", flush=True)
    for pipe in pipes.values():
        pipe.send(None)
    for process in processes:
        process.join()
    compared = agree(name, portions)
    return {
        "parameters": parameters.pop(),
        "batch_size": setup.batch_size,
        "trees_compared": compared,
        "ours_times": {engine: round(rate(portions["ours"]) / rate(found), 1) for engine, found in portions.items()},
        "engines": {engine: figures(found, batch(setup, engine)) for engine, found in portions.items()},
    }


def rate(portions: Sequence[Mapping[str, Any]]) -> float:
    """Rollouts a minute."""
    return 60 * sum(found["rollouts"] for found in portions) / sum(found["wall"] for found in portions)


def batch(setup: Setup, engine: str) -> int:
    return 1 if engine == "released" else setup.batch_size


def agree(name: str, portions: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, dict[str, int]]:
    """How many trees of each engine were compared with ours, and how many of them part at a near tie; stops the run at the
    first that differs in any other way."""
    ours = {number: tree for found in portions["ours"] for number, tree in found["trees"].items()}
    compared = {}
    for engine, founds in portions.items():
        trees = {number: tree for found in founds for number, tree in found["trees"].items()}
        different = [number for number, tree in trees.items() if tree[:5] != ours[number][:5]]
        for number in different:
            if not near_tie(trees[number], ours[number]):
                raise SystemExit(f"{name}: the tree of problem {number} differs between {engine} and ours")
        compared[engine] = {"trees": len(trees), "near_ties": len(different)}
    return compared


def near_tie(tree: tuple[Any, ...], other: tuple[Any, ...]) -> bool:
    """Do the trees part where two functional tokens are equally probable but for the rounding of a forward pass (whose order of
    summation hangs on the batch)? Their order among the children is then open, and all that follows from it."""
    parents, tags, tokens, _, _, priors = (
        list(zip(*columns, strict=False)) for columns in zip(tree, other, strict=True)
    )
    first = next((k for k, (a, b) in enumerate(tags) if a != b), None)
    if first is None:
        return False
    before = all(a == b or a is None or b is None for a, b in tokens[:first]) and all(
        a == b for a, b in parents[:first]
    )
    return before and parents[first][0] == parents[first][1] and abs(priors[first][0] - priors[first][1]) < 1e-6


def figures(portions: Sequence[Mapping[str, Any]], batch_size: int) -> dict[str, Any]:
    kept = ("trees", "peak", "idle", "cache")
    total = Counter()
    for found in portions:
        total.update({key: value for key, value in found.items() if key not in kept})
    wall, rollouts = total["wall"], total["rollouts"]
    seconds = {key.removeprefix("seconds "): s for key, s in total.items() if key.startswith("seconds ")}
    named = sum(seconds.values()) + total["scoring"]
    return {
        "rollouts_per_min": round(rate(portions), 1),
        "rollouts_per_min_by_portion": [round(rate([p]), 1) for p in portions],
        "nodes_per_s": round(total["nodes"] / wall, 2),
        "computed_per_useful": round(total["computed"] / total["useful"], 3),
        "generated_per_rollout": round(total["generated"] / rollouts, 1),
        "computed_per_rollout": round(total["computed"] / rollouts, 1),
        "rows_per_step": round(total["rows"] / total["steps"], 2),
        "occupancy": round(total["rows"] / total["steps"] / batch_size, 3),
        "context": round(total["context"] / total["generated"]),
        "segments_per_path": round(total["depth"] / rollouts, 1),
        "tokens_per_segment": round(total["generated"] / total["nodes"], 1),
        "peak_MB": round(max(p["peak"] for p in portions) / 1e6),
        "peak_above_idle_MB": round(max(p["peak"] - p["idle"] for p in portions) / 1e6),
        "keys_and_values_MB": round(max(p["cache"] for p in portions) / 1e6),
        "problems": sum(len(p["trees"]) for p in portions),
        "rollouts": rollouts,
        "nodes": total["nodes"],
        "planned_nodes": total["planned"],
        "forward_passes": total["calls"],
        "seconds": round(wall, 1),
        "shares": {
            **{key: round(s / wall, 3) for key, s in sorted(seconds.items())},
            "scoring": round(total["scoring"] / wall, 3),
            "rest": round(1 - named / wall, 3),
        },
    }


# -- the tree alone ------------------------------------------------------------------------------------------------------


def tree_logic(sizes: Sequence[int]) -> dict[str, Any]:
    """One tree grown to so many visited nodes, with a policy and a judge that answer at once; the fastest of three, since others
    use the machine, too."""
    found: dict[str, Any] = {}
    for size in sizes:
        times = []
        for _ in range(3):
            began = time.perf_counter()
            tree = synthetic(size)
            times.append(time.perf_counter() - began)
        seconds = min(times)
        tree.check()
        visited = sum(segment is not None for segment in tree.segments)
        found[str(size)] = {
            "visited_nodes_per_s": round(visited / seconds),
            "all_nodes_per_s": round(len(tree) / seconds),
            "visited_nodes": visited,
            "all_nodes": len(tree),
            "rollouts": len(tree.leaves),
            "seconds": round(seconds, 3),
            "seconds_of_all": [round(each, 3) for each in times],
        }
        print(f"tree logic {size:>7,} nodes {found[str(size)]['visited_nodes_per_s']:>9,} nodes/s", flush=True)
    profile = cProfile.Profile()
    profile.runcall(synthetic, min(sizes[-1], 10_000))
    rows = [(name, calls, own) for (_, _, name), (_, calls, own, _, _) in pstats.Stats(profile).stats.items()]
    whole = sum(own for _, _, own in rows)
    found["profile"] = [
        {"function": name, "calls": calls, "share_of_own_time": round(own / whole, 3)}
        for name, calls, own in sorted(rows, key=lambda row: -row[2])[:12]
    ]
    return found


def synthetic(size: int) -> Tree:
    """Paths of up to 18 segments under the paper's grammar, all legal followers planned at each new node."""
    rng = random.Random(0)
    wheel: dict[str, list[list[Plan]]] = {}
    for tag in (QUESTION, *TABLE.names):
        legal = TABLE.legal(tag)[:5]
        wheel[tag] = [[Plan(t, 1 / len(legal)) for t in rng.sample(legal, len(legal))] for _ in range(16)]
    segments = {tag: Segment(tag, (1, 2, 3), (0.0,) * 3, (0,) * 3, "", True) for tag in TABLE.names}
    scores = [Score(Verdict(Status.WRONG), rng.random(), ()) for _ in range(64)]
    tree, filled, turn = Tree(Problem("synthetic", ""), (0,)), 0, 0
    while filled < size:
        start = tree.select(2.0)
        if start is None:
            break
        tree.hold(start)
        node, depth = start, len(tree.path(start))
        while depth < 18:
            if node:
                tree.fill(node, segments[tree.tag(node)])
                filled += 1
            turn += 1
            plans = wheel[tree.tag(node)][turn % 16]
            if not plans:
                break
            node, depth = tree.plan(node, plans)[0], depth + 1
        else:
            tree.fill(node, segments[tree.tag(node)])
            filled += 1
        tree.end(node, complete=TABLE.terminal(tree.tag(node)))
        tree.hold(start, -1)
        tree.backup(node, scores[turn % 64])
    return tree


# -- what is shown -------------------------------------------------------------------------------------------------------


def table(results: Mapping[str, Any]) -> str:
    head = ["model", "engine", "rollouts/min", "x released", "nodes/s", "computed/useful", "generated a rollout"]
    head += ["computed a rollout", "rows a step / most", "peak MB (above idle)", "in forward passes"]
    lines = [head, ["---"] * 2 + ["---:"] * (len(head) - 2)]
    for name, found in results["models"].items():
        slow = found["engines"]["released"]["rollouts_per_min"]
        for engine, f in found["engines"].items():
            most = 1 if engine == "released" else found["batch_size"]
            cells = [name, engine, f"{f['rollouts_per_min']:,.0f}", f"{f['rollouts_per_min'] / slow:.1f}"]
            cells += [f"{f['nodes_per_s']:,.1f}", f"{f['computed_per_useful']:.2f}"]
            cells += [f"{f['generated_per_rollout']:.0f}", f"{f['computed_per_rollout']:,.0f}"]
            cells += [f"{f['rows_per_step']:.1f} / {most}"]
            cells += [f"{f['peak_MB']:,} ({f['peak_above_idle_MB']:,})", f"{f['shares']['model']:.0%}"]
            lines.append(cells)
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def plot(results: Mapping[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    models = results["models"]
    figure, axes = plt.subplots(1, len(models), figsize=(3.2 * len(models), 3.2), squeeze=False, layout="constrained")
    for ax, (name, found) in zip(axes[0], models.items(), strict=True):
        rates = {engine: f["rollouts_per_min"] for engine, f in found["engines"].items()}
        bars = ax.bar(list(rates), list(rates.values()), color=["#bab0ac", "#bab0ac", "#bab0ac", "#4e79a7"])
        ax.bar_label(bars, [f"{rate / rates['released']:.1f}x" for rate in rates.values()], fontsize=8)
        context = found["engines"]["ours"]["context"]
        ax.set_title(f"{name}: {found['parameters'] / 1e6:.1f} M, context {context}", fontsize=9)
        ax.tick_params(labelsize=8)
        ax.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("rollouts a minute")
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).parent, help="results.json, table.md, speed.png")
    parser.add_argument("--models", nargs="+", default=["tiny", "11M", "50M"], choices=["tiny", "11M", "50M"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="a few small trees: does all work?")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    setups = {name: shrunk(setup) if options.quick else setup for name, setup in SETUPS.items()}
    began = time.perf_counter()
    results: dict[str, Any] = {"threads": options.threads, "engines": ENGINES}
    with tempfile.TemporaryDirectory() as taught:
        teach(Path(taught), 20 if options.quick else 100, options.threads)
        found = {name: measure(name, setups[name], taught, options.threads) for name in (*options.models, "occupancy")}
    searched = found.pop("occupancy")["engines"]["ours"]
    results["models"] = found
    shares = searched["shares"]
    outside = 1 - shares["model"]
    results["occupancy"] = {key: searched[key] for key in ("occupancy", "rows_per_step", "problems", "rollouts")}
    results["overhead"] = {
        "python_outside_the_model": round(outside - shares["choose"] - shares["copy"], 3),
        "outside_forward_passes": round(outside, 3),
        "scoring": shares["scoring"],
        "seconds": searched["seconds"],
    }
    results["search"] = searched
    results["tree_logic"] = tree_logic([300, 1000] if options.quick else [1_000, 10_000, 100_000])
    results["seconds"] = round(time.perf_counter() - began, 1)
    (options.out / "results.json").write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    (options.out / "table.md").write_text(table(results), encoding="utf-8")
    plot(results, options.out / "speed.png")
    print(table(results))
    print(f"occupancy {results['occupancy']}\noverhead {results['overhead']}\nresults: {options.out / 'results.json'}")


if __name__ == "__main__":
    main()
