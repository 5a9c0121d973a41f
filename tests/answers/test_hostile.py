"""Nothing that a model writes may run, hang, or exhaust memory."""

import contextlib
import json
import multiprocessing
import os
import random
import subprocess
import sys
import threading
import time

import pytest

from rftt_lightning.answers import verify, workers
from rftt_lightning.answers.parse import Unreadable, parse
from rftt_lightning.answers.workers import PROVERS, Provers, TimedOut
from rftt_lightning.core.contracts import Status

N = 100_000
HOSTILE = {
    "digits": "7" * N, "decimals": "0." + "3" * N, "braces": "{" * 10_000 + "1" + "}" * 10_000, "parens": "(" * 10_000 + ")" * 10_000,
    "fractions": r"\frac{1}{" * 3000 + "1" + "}" * 3000, "megabyte": "x+" * 500_000, "spaces": " " * 1_000_000 + "5x", "boxes": r"\boxed{" * N,
    "dollars": "$" * N, "tower": "9^9^9^9", "tower2": "9^{9^{9^{9}}}", "tower3": "2^{3^{4^{5^{6}}}}+1", "tower4": "((9^9)^9)^{99}",
    "factorial": "999999999!", "factorials": "9!!!!!!!!", "factorial2": "(10^9)!", "binomial": r"\binom{10^9}{5\cdot 10^8}", "exponent": "1e999999",
    "exponent2": r"10^{10^{10}}", "symbolic": "(a+b+c+d+f)^{9999}", "symbolic2": "(x+y)^{500}(x-y)^{500}(z+1)^{500}", "code": '__import__("os").system("touch PWNED")',
    "code2": 'eval(open("PWNED","w"))', "code3": r"\text{__import__('os').system('touch PWNED')}", "lambda": "(lambda: 1)()", "attribute": "x.__class__.__mro__",
    "products": "2*" * 1500 + "2", "signs": "-" * 3000 + "1", "bangs": "5" + "!" * 3000, "primes": "f" + "'" * 3000, "powers": "2" + "^2" * 1500,
    "relations": "1" + "<2" * 1500, "commas": "1" + ",2" * 1900, "roots": r"\sqrt" * 900 + "2", "matrix": r"\begin{pmatrix}" + "1&" * 1500 + r"1\end{pmatrix}",
    "bars": "|" * 3000, "nulls": "\x00" * 100, "surrogate": "\ud800", "dots": "0." + "12" * 1500 + "...", "sines": r"\sin" * 1000 + "x",
    "sums": "+".join(f"1/{k}^{{999}}" for k in range(2, 200)), "huge angle": r"\sin(10^{9999})", "list": ",".join(rf"\sqrt{{{k}}}" for k in range(2, 66)),
    "unclosed": r"\begin{pmatrix}1&2", "subscripts": "x" + "_x" * 1500, "zero": r"\frac{1}{0}", "zero power": "0^{-1}", "log zero": r"\ln 0", "base": "9_8",
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_answers_end_in_time_and_are_not_right(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    PROVERS.ask("digits", [parse("2")], 10)  # its start is not this input's fault
    for gold in ("12", r"\sqrt{2}+x"):
        for response in (HOSTILE[name], rf"\boxed{{{HOSTILE[name]}}}"):
            began = time.monotonic()
            verdict = verify(gold, response)
            assert time.monotonic() - began < 5
            assert not verdict.right
    began = time.monotonic()
    assert verify(HOSTILE[name], r"\boxed{3}").status is not Status.RIGHT
    assert time.monotonic() - began < 5
    assert not list(tmp_path.iterdir())


def test_limits_before_reading():
    for text in ("1" * 4001, "(" * 40 + "1" + ")" * 40, "2*" * 200 + "2"):
        with pytest.raises(Unreadable):
            parse(text)


def slow_question(pool, seconds=0.5):
    """A determinant that sympy cannot expand in time."""
    rows = r"\\".join("&".join(f"x_{{{i}{j}}}" for j in range(9)) for i in range(9))
    return pool.ask("equal", [parse(rf"\begin{{vmatrix}}{rows}\end{{vmatrix}}"), parse("1")], seconds)


def test_a_worker_that_overruns_is_killed_and_replaced():
    pool = Provers(1)
    assert pool.ask("equal", [parse(r"\sqrt{8}"), parse(r"2\sqrt2")], 10) is True
    (before,) = pool._idle
    began = time.monotonic()
    with pytest.raises(TimedOut):
        slow_question(pool)
    assert time.monotonic() - began < 3
    assert before.process.poll() is not None
    assert pool.ask("equal", [parse(r"\sqrt{8}"), parse(r"3\sqrt2")], 10) is False
    pool.close()


def test_a_worker_that_dies_is_replaced():
    pool = Provers(1)
    pool.ask("digits", [parse("2")], 10)
    pool._idle[0].process.kill()
    pool._idle[0].process.wait()
    with pytest.raises(TimedOut):
        pool.ask("digits", [parse("2")], 10)
    assert pool.ask("digits", [parse("2")], 10) is not None
    pool.close()


def test_time_out_is_a_verdict_of_its_own(monkeypatch):
    def overrun(*args):
        raise TimedOut("wall clock")

    monkeypatch.setattr(PROVERS, "ask", overrun)
    gold, response = r"\sqrt{3}+\ln 7", r"\boxed{\ln 7 - \sqrt{5}}"
    assert verify(gold, response).status is Status.TIMED_OUT
    monkeypatch.undo()
    assert verify(gold, response).status is Status.WRONG  # the time-out was not remembered


def test_plain_numbers_need_no_worker(monkeypatch):
    def refuse(*args):
        raise AssertionError("a worker was asked")

    monkeypatch.setattr(PROVERS, "ask", refuse)
    for gold, answer in [
        ("1,000", "1000"),
        (r"\frac12", "0.5"),
        ("3", "4"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"2\pi", r"\pi\cdot 2"),
        ("x>3", r"(3,\infty)"),
    ]:
        assert verify(gold, rf"\boxed{{{answer}}}").right == (gold != "3")


def test_sympy_is_not_imported_by_the_caller():
    code = "import sys; from rftt_lightning.answers import verify; assert verify('1/2', '0.5').right; assert 'sympy' not in sys.modules; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_from_many_threads():
    wrong = []

    def work(k):
        if not verify(rf"\sqrt{{{k * k * 7}}}", rf"{k}\sqrt7").right:
            wrong.append(k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(2, 14)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong


def in_child(queue):
    queue.put((os.getpid(), verify(r"\sqrt{18}", r"3\sqrt2").right, verify(r"\sqrt{18}", r"2\sqrt3").right))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_after_fork_and_spawn_from_a_daemon(method):
    assert verify(r"\sqrt{50}", r"5\sqrt2").right
    mine = {worker.process.pid for worker in PROVERS._idle}
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=in_child, args=(queue,), daemon=True)
    process.start()
    pid, right, wrong = queue.get(timeout=60)
    process.join(60)
    assert (right, wrong) == (True, False)
    assert pid != os.getpid()
    assert {worker.process.pid for worker in PROVERS._idle} == mine
    assert all(worker.process.poll() is None for worker in PROVERS._idle)
    assert verify(r"\sqrt{98}", r"7\sqrt2").right


def test_close_leaves_no_process():
    pool = Provers(1)
    pool.ask("digits", [parse("2")], 10)
    process = pool._idle[0].process
    pool.close()
    assert process.poll() is not None


def test_only_trees_cross_the_pipe():
    assert json.loads(json.dumps(workers.to_json(parse("2x")))) == ["*", "", [["num", "2", []], ["sym", "x", []]]]


PIECES = [
    r"\frac",
    r"\sqrt",
    r"{",
    r"}",
    r"(",
    r")",
    r"[",
    r"]",
    r"\{",
    r"\}",
    r",",
    r";",
    r":",
    r"=",
    r"<",
    r">",
    r"\le",
    r"\in",
    r"\cup",
    r"\pm",
    r"+",
    r"-",
    r"*",
    r"/",
    r"^",
    r"_",
    r"!",
    r"%",
    r"|",
    r"1",
    r"2",
    r"0",
    r"0.5",
    r"1,000",
    r"12",
    r"x",
    r"y",
    r"f",
    r"e",
    r"i",
    r"\pi",
    r"\infty",
    r"\text{a}",
    r"\begin{pmatrix}",
    r"\end{pmatrix}",
    r"&",
    r"\\",
    r"\boxed{",
    r"$",
    r"\sin",
    r"\log",
    r"\lfloor",
    r"\rfloor",
    r"\binom",
    r"\mathbb{R}",
    r"and",
    r"or",
    r"cm",
    r"'",
    r"...",
    r"\mod",
    r"\overline",
    r"####",
    r"answer",
    r"is",
]


def test_random_scraps_never_raise_and_equal_themselves_or_nothing():
    draw = random.Random(0)
    for _ in range(1500):
        text = draw.choice(("", " ")).join(draw.choices(PIECES, k=draw.randrange(1, 12)))
        other = draw.choice(("", " ")).join(draw.choices(PIECES, k=draw.randrange(1, 6)))
        assert verify(text, other).status in Status
        assert verify(text, text, kind="answer").status in (Status.RIGHT, Status.NO_ANSWER)


@pytest.mark.parametrize("text", ["7^{99999999999}", "99999999!", "7^{7^{12}}+x"])
def test_even_past_the_guards_a_worker_is_bounded(text):
    """Straight to the worker, past the size checks: memory and time are limited there too, and the next question is answered."""
    pool = Provers(1)
    pool.ask("digits", [parse("2")], 10)
    status = f"/proc/{pool._idle[0].process.pid}/status"
    peak = [0]

    def watch():
        while peak[0] >= 0:
            try:
                with open(status) as file:
                    peak.append(next(int(line.split()[1]) for line in file if line.startswith("VmHWM")))
            except (OSError, StopIteration):
                return
            time.sleep(0.05)

    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    with contextlib.suppress(TimedOut):
        assert pool.ask("equal", [parse(text), parse("1")], 1.0) is not True
    assert time.monotonic() - began < 3
    assert pool.ask("equal", [parse(r"\sqrt{8}"), parse(r"2\sqrt2")], 10) is True
    pool.close()
    watcher.join(5)
    assert max(peak) < 1_100_000  # kB
