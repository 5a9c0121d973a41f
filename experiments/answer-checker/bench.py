"""How often is the checker right, how long does it take, and what does it need? Our checker beside Math-Verify, in one run.

python experiments/answer-checker/bench.py agreement PAIRS.jsonl …   pairs with gold, response, equal (and topic)
python experiments/answer-checker/bench.py golds --math500 F --gsm8k F --olympiadbench F
python experiments/answer-checker/bench.py hostile [PAIRS.jsonl …]   ours are generated; pairs with equal false may be added
python experiments/answer-checker/bench.py speed --math500 F         ours and Math-Verify on equal and unequal variants
python experiments/answer-checker/bench.py soak --checks 1000000     leaks: processes, descriptors, memory
python experiments/answer-checker/bench.py fuzz --minutes 10         hypothesis over verify and extract
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import random
import re
import resource
import statistics
import subprocess
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from rftt_lightning.answers import extract, verify, verify_many
from rftt_lightning.answers.checker import forget
from rftt_lightning.answers.pool import POOL
from rftt_lightning.answers.second import second_opinions
from rftt_lightning.core.contracts import Status, Verdict

Pair = tuple[str, str]
SHOW = Console(width=150)


def read(paths: Iterable[str]) -> list[dict]:
    return [json.loads(line) for path in paths for line in Path(path).read_text(encoding="utf-8").splitlines()]


# -- agreement


def agreement(paths: Sequence[str]) -> None:
    for path in paths:
        rows = [row for row in read([path]) if "suspect" not in row]
        pairs = [(row["gold"], row["response"]) for row in rows]
        ours, theirs = verify_many(pairs), second_opinions("math_verify", pairs)
        table = Table("form", "pairs", "ours", "false accepts", "Math-Verify", "false accepts", title=Path(path).name)
        forms = defaultdict(list)
        for row, mine, other in zip(rows, ours, theirs, strict=True):
            forms[row.get("topic") or row.get("form", "")].append((row["equal"], mine.right, other.right))
        for form, results in [*sorted(forms.items()), ("all", [r for group in forms.values() for r in group])]:
            cells = [form, str(len(results))]
            for column in (1, 2):
                same = sum(r[0] == r[column] for r in results)
                cells += [f"{same / len(results):.1%}", str(sum(r[column] and not r[0] for r in results))]
            table.add_row(*cells, style="bold" if form == "all" else None)
        SHOW.print(table)
        for row, mine in zip(rows, ours, strict=True):
            if mine.right != row["equal"]:
                SHOW.print(
                    f"  {row['gold']!r} | {row['response']!r:.100} | equal {row['equal']}: {mine.status}, {mine.rule}",
                    markup=False,
                )


# -- golds


def golds(math500: str, gsm8k: str, olympiadbench: str) -> None:
    rows = [(f"math500/{r['unique_id']}", r["answer"], r["solution"]) for r in read([math500])]
    rows += [(f"gsm8k/{n}", r["answer"].split("####")[1].strip(), r["answer"]) for n, r in enumerate(read([gsm8k]))]
    rows += [(f"olympiadbench/{r['id']}", r["final_answer"][0], r["solution"][0]) for r in read([olympiadbench])]
    itself = verify_many([(gold, rf"So it is $\boxed{{{gold}\,}}$.") for _, gold, _ in rows])
    stating = [row for row in rows if not row[0].startswith("olympiad") or _states(row[2])]
    inside = verify_many([(gold, text) for _, gold, text in stating])
    for what, keys, verdicts in (
        ("gold equals itself, boxed", rows, itself),
        ("gold in its own solution", stating, inside),
    ):
        for name in ("math500", "gsm8k", "olympiadbench"):
            of = [v for row, v in zip(keys, verdicts, strict=True) if row[0].startswith(name)]
            print(f"{what}: {name} {sum(v.right for v in of)} of {len(of)}")
        for (key, gold, _), verdict in zip(keys, verdicts, strict=True):
            if not verdict.right:
                print(f"  {key}: {gold!r} {verdict.status} by {verdict.rule}, read {verdict.answer!r:.80}")


def _states(solution: str) -> bool:
    """Does a proof of OlympiadBench end in a sentence that states its answer?"""
    return bool(re.search(r"answer is[^.]{0,60}\$[^$]+\$[^$]{0,40}$", solution.strip()))


# -- hostile


def hostile_pairs(seed: int = 0) -> Iterator[dict]:
    """Over 400: numbers, nesting, lengths, towers, sums, matrices, lists, code, signs; in each of three dresses and as gold."""
    n, draw = 100_000, random.Random(seed)
    bare = {
        "number": [
            "7" * n, "0." + "3" * n, "1e" + "9" * 9, "-" * 3000 + "1", "1" + ",000" * n, "0." + "12" * 1500 + "...",
            "9_8", "z" * 4000 + "_{36}",
        ],
        "nesting": [
            *(o * 10_000 + "1" + c * 10_000 for o, c in ("{}", "()", "[]", "||")), r"\frac{1}{" * 3000 + "1" + "}" * 3000,
            r"\sqrt{" * 3000 + "2" + "}" * 3000,
        ],
        "length": [
            c * 1_000_000 for c in (
                "x+", " ", "$", "\\", ",", "1 ", "\n", "a", r"\boxed{", r"\text{", "#### ", "answer is ", "(", "\u0301", "½",
            )
        ],
        "tower": [
            "9^9^9^9", "9^{9^{9^{9}}}", r"10^{10^{10}}", "2^{-10^{12}}", "((9^9)^9)^{99}", "e^{e^{e^{e^{10}}}}",
            r"\sqrt[10^9]{2}",
            r"1.0000001^{10^{12}}", r"(\sqrt2-1)^{1000}",
        ],
        "factorial": [
            "999999999!", "9!!!!!!!!", "(10^9)!", r"\binom{10^9}{5\cdot 10^8}", r"\frac{(10^6)!}{(10^6-1)!}+1",
            "5" + "!" * 3000,
            r"\binom{2n}{n}^{999}",
        ],
        "sum": [
            r"\sum_{k=1}^{10^{12}} k^{99}", r"\prod_{k=1}^{10^9} k", r"\sum_{k=1}^{99999} \frac{1}{k^{999}}",
            r"\int_0^{10^9} e^{x^2}dx",
            "+".join(f"1/{k}^{{99}}" for k in range(2, 200)),
        ],
        "symbols": [
            "(a+b+c+d+f)^{9999}", "(x+y)^{500}(x-y)^{500}(z+1)^{500}", "+".join(rf"\sqrt[3]{{{k}}}" for k in range(2, 12)),
            r"\sqrt{2+" * 12 + "x" + "}" * 12, r"\sin(10^{9999})", r"\tanh(10^{6})",
        ],
        "matrix": [
            r"\begin{pmatrix}" + "1&" * 1500 + r"1\end{pmatrix}", r"\begin{pmatrix}1&2",
            r"\begin{vmatrix}" + r"\\".join("&".join(f"x_{{{i}{j}}}" for j in range(9)) for i in range(9)) + r"\end{vmatrix}",
        ],
        "list": [
            ",".join(rf"\sqrt{{{k}}}" for k in range(2, 200)), ",".join(map(str, range(1000))), "1" + "<2" * 1500,
            r"\{" + ",".join(rf"\{{{k},{k + 1}\}}" for k in range(90)) + r"\}",
        ],
        "code": [
            '__import__("os").system("touch PWNED")', 'open("PWNED","w")', "(lambda: 1)()", "x.__class__.__mro__",
            r"\input{/etc/passwd}",
            r"\write18{touch PWNED}", "exec('while 1: pass')", "${jndi:x}", "{{7*7}}",
        ],
        "signs": [
            "\x00" * 100, "\ud800", "\u202e13\u202c", "\u0661" * n, "²" * n, "{" * n, "}" * n, r"\left(" * n,
            r"\begin{a}" * 9999, r"\right)",
            r"\\" * n, "$1$" * 9999,
        ],
        "undefined": [
            r"\frac{1}{0}", "0^{-1}", r"\ln 0", r"\infty-\infty", r"\frac00", r"\log_1 5", r"5 \bmod 0",
            r"\sqrt[0]{2}", "nan", "zoo",
        ],
    }  # fmt: skip
    golds = ["12", r"\sqrt{2}+x", "(1,2)", "x<3", r"\{1,2\}", r"\frac{\pi}{4}", "y=2x+1", r"\text{(B)}"]
    for family, answers in bare.items():
        for answer in answers:
            for response in (answer, rf"We get \boxed{{{answer}}}.", f"The answer is {answer}"):
                yield {"gold": draw.choice(golds), "response": response, "topic": family, "equal": False}
            yield {"gold": answer, "response": r"\boxed{3}", "topic": family + " as gold", "equal": False}


def hostile(paths: Sequence[str]) -> None:
    """Each from the main thread and from another one; memory of the workers is watched."""
    rows = [*hostile_pairs(), *read(paths)]
    verify(r"\sqrt8", r"2\sqrt2")  # a worker's start is no input's fault
    peak = [0]
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(peak, done))
    watcher.start()
    for place in ("main thread", "another thread"):
        forget()
        results: list[tuple[float, Verdict]] = []
        if place == "main thread":
            _time_all(rows, results)
        else:
            thread = threading.Thread(target=_time_all, args=(rows, results))
            thread.start()
            thread.join()
        slow = sorted((seconds for seconds, _ in results), reverse=True)
        accepted = [row for row, (_, verdict) in zip(rows, results, strict=True) if verdict.right and not row["equal"]]
        counts = Counter(str(verdict.status) for _, verdict in results)
        late = sum(seconds > 1 for seconds in slow)
        print(
            f"{place}: {len(rows)} inputs, slowest {slow[0]:.2f} s, over 1 s: {late}, accepted: {len(accepted)}, {dict(counts)}"
        )
        for row in accepted:
            print(f"  accepted: {row['gold']!r:.60} {row['response']!r:.100}")
    done.set()
    watcher.join()
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
    print(f"peak memory: a worker {max(peak)} MB, this process {own} MB; file PWNED: {Path('PWNED').exists()}")


def _time_all(rows: Sequence[dict], results: list[tuple[float, Verdict]]) -> None:
    for row in rows:
        began = time.perf_counter()
        verdict = verify(row["gold"], row["response"])
        results.append((time.perf_counter() - began, verdict))


def _watch(peak: list[int], done: threading.Event) -> None:
    while not done.wait(0.05):
        peak.append(max((_resident(pid) for pid in _children()), default=0))


def _children() -> list[int]:
    found, waiting = [], [os.getpid()]
    while waiting:
        listed = subprocess.run(["pgrep", "-P", str(waiting.pop())], capture_output=True, text=True).stdout.split()
        found += map(int, listed)
        waiting += map(int, listed)
    return found


def _resident(pid: int, field: str = "VmHWM") -> int:
    """MB, the most so far (VmHWM) or now (VmRSS); 0 when it is gone."""
    try:
        match = re.search(rf"{field}:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())
    except OSError:
        return 0
    return int(match[1]) >> 10 if match else 0


# -- speed


def variants(gold: str) -> Iterator[Pair]:
    """Two that are equal, two that are not (so far as the form allows)."""
    yield gold, gold.replace(r"\frac", r"\dfrac").replace("(", r"\left(").replace(")", r"\right)") + r"\,"
    yield gold, re.sub(r"(?<![\d.,_^{\\])(\d+)(?![\d.,}_])", lambda m: f"({int(m[1]) - 1}+1)", gold, count=1)
    digit = re.search(r"\d", gold)
    yield gold, gold[: digit.start()] + str((int(digit[0]) + 1) % 10) + gold[digit.end() :] if digit else gold + "1"
    yield gold, gold + "+1"


def speed(math500: str) -> None:
    pairs = [(gold, rf"\boxed{{{answer}}}") for row in read([math500]) for gold, answer in variants(row["answer"])]
    verify(r"\sqrt8", r"2\sqrt2")
    table = Table(
        "checker",
        "checks/s",
        "p50 ms",
        "p99 ms",
        "slowest ms",
        title=f"{len(pairs)} checks, one process, answers not seen before",
    )
    rates = {}
    for name in ("ours", "Math-Verify"):
        times = []
        forget()
        for pair in pairs:
            began = time.perf_counter()
            verify(*pair) if name == "ours" else second_opinions("math_verify", [pair])
            times.append(1000 * (time.perf_counter() - began))
        rates[name] = 1000 * len(times) / sum(times)
        cut = statistics.quantiles(times, n=100)
        table.add_row(name, f"{rates[name]:.0f}", f"{cut[49]:.2f}", f"{cut[98]:.2f}", f"{max(times):.1f}")
    SHOW.print(table)
    print(f"ours / Math-Verify: {rates['ours'] / rates['Math-Verify']:.1f}")
    verify_many([(gold, f"{answer[:-1]} + 0}}") for gold, answer in pairs])  # two workers are up
    for repeat in range(3):
        seconds = {}
        for workers in (1, 2):  # texts that no process has seen
            long = [
                (gold, f"{answer[:-1]} + 0 \\cdot {10 * k + 2 * repeat + workers}}}")
                for k in range(5)
                for gold, answer in pairs
            ]
            began = time.perf_counter()
            verify_many(long, workers=workers)
            seconds[workers] = time.perf_counter() - began
        ratio = seconds[1] / seconds[2]
        print(
            f"verify_many, run {repeat}: {len(long)} pairs, 1: {seconds[1]:.2f} s, 2: {seconds[2]:.2f} s, ratio {ratio:.2f}"
        )


# -- soak


def soak(checks: int) -> None:
    """Pairs that were not seen before, one in a hundred hostile."""
    bad = [row for row in hostile_pairs() if len(row["response"]) < 5000]
    draw, done, began = random.Random(0), 0, time.monotonic()
    batches = itertools.count()
    while done < checks:
        batch = []
        for _ in range(10_000):
            a, b = draw.randrange(10**6), draw.randrange(1, 10**4)
            kind = draw.randrange(100)
            if kind == 0:
                row = draw.choice(bad)
                batch.append((row["gold"], f"{row['response']} {a}"))
            elif kind < 10:
                batch.append((rf"\sqrt{{{b * b * 3}}}+{a}", rf"\boxed{{{a}+{b}\sqrt{{3}}}}"))
            elif kind < 50:
                batch.append((rf"\frac{{{a}}}{{{b}}}", rf"\boxed{{{a}/{b}}}"))
            else:
                batch.append((str(a), f"The answer is {a + kind % 2}."))
        verdicts = Counter(verdict.status for verdict in verify_many(batch, workers=2))
        done += len(batch)
        if next(batches) % 10 == 0 or done >= checks:
            sizes = [_now(pid) for pid in _children()]
            print(
                f"{done} checks, {time.monotonic() - began:.0f} s: {len([*Path('/proc/self/fd').iterdir()])} descriptors, "
                f"{len(sizes)} processes of {sizes} MB, this one {_now(os.getpid())} MB; last batch {dict(verdicts)}",
                flush=True,
            )
    POOL.close()
    print("after close:", [pid for pid in _children() if _now(pid)])


def _now(pid: int) -> int:
    return _resident(pid, "VmRSS")


# -- fuzz

SCRAPS = (
    r"\frac \sqrt { } ( ) [ ] \{ \} , ; : = < > \le \ge \in \cup \cap \pm + - * / ^ _ ! % | 1 2 0 7 0.5 1,000 12 x "
    r"y f e i k n \pi \infty "
    r"\text{a} \text{cm} \begin{pmatrix} \end{pmatrix} & \\ \boxed{ $ $$ \( \) \sin \log_2 \lfloor \rfloor \binom "
    r"\mathbb{R} and or cm ' "
    r"... \mod \pmod \overline #### answer is: \sum_{k=1} \mid k\in\mathbb{Z} degrees base_{3} million \over \circ "
    r"hours U ] \setminus "
    r"<output> </output> <refine> ² ½ − √ ∞ ١ × \left \right \begin{cases} \end{cases} 0.\overline{3}"
).split()
TEXTS = st.one_of(
    st.lists(st.sampled_from(SCRAPS), max_size=25).map("".join),
    st.lists(st.sampled_from(SCRAPS), max_size=25).map(" ".join),
    st.text(max_size=60),
    st.tuples(st.lists(st.sampled_from(SCRAPS), max_size=6).map("".join), st.text(max_size=8)).map("".join),
)  # fmt: skip


def fuzz(minutes: float) -> None:
    """No exception, no check over a second, nothing but known verdicts; sums and products of integers and x are symmetric."""
    end, count, slowest = time.monotonic() + 60 * minutes, 0, 0.0
    verify(r"\sqrt8", r"2\sqrt2")

    @settings(
        max_examples=500, deadline=None, suppress_health_check=list(HealthCheck), database=None, derandomize=False
    )
    @given(TEXTS, TEXTS)
    def check(left: str, right: str) -> None:
        nonlocal count, slowest
        began = time.monotonic()
        verdict = verify(left, right)
        slowest = max(slowest, time.monotonic() - began)
        count += 1
        assert verdict.status in Status
        assert verdict.rule != "worker died", (left, right)  # so a fault of the checker ends
        assert time.monotonic() - began < 1.0, (left, right)
        answer = extract(left)
        assert answer is None or isinstance(answer, str)
        assert verify(left, left, kind="answer").status in (
            Status.RIGHT,
            Status.NO_ANSWER,
            Status.UNPARSABLE_GOLD,
            Status.WRONG,
        )
        if re.fullmatch(r"[\d\s+*/^()x-]*", left + right) and left.strip() and right.strip():
            assert verify(left, right, kind="answer").right == verify(right, left, kind="answer").right, (left, right)

    while time.monotonic() < end:
        check()
        forget()
    print(f"{count} pairs in {minutes} minutes: no exception, slowest {slowest:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    jobs = parser.add_subparsers(dest="job", required=True)
    for name in ("agreement", "hostile"):
        jobs.add_parser(name).add_argument("paths", nargs="*" if name == "hostile" else "+")
    for name, files in (("golds", ("math500", "gsm8k", "olympiadbench")), ("speed", ("math500",))):
        job = jobs.add_parser(name)
        for file in files:
            job.add_argument(f"--{file}", required=True)
    jobs.add_parser("soak").add_argument("--checks", type=int, default=1_000_000)
    jobs.add_parser("fuzz").add_argument("--minutes", type=float, default=10)
    options = vars(parser.parse_args())
    {"agreement": agreement, "golds": golds, "hostile": hostile, "speed": speed, "soak": soak, "fuzz": fuzz}[
        options.pop("job")
    ](**options)


if __name__ == "__main__":
    main()
