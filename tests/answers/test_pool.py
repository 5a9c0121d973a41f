"""Containment: workers that hang, die or outgrow their memory are replaced, and nobody who asks notices more than a verdict."""

import asyncio
import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rftt_lightning.answers import pool as pool_module
from rftt_lightning.answers import verify, verify_many, worker
from rftt_lightning.answers.equal import NeedsProof
from rftt_lightning.answers.pool import POOL, BrokenChecker, Pool, TimedOut
from rftt_lightning.answers.worker import BYTES
from rftt_lightning.core.contracts import Status

SLOW = r"\begin{vmatrix}" + r"\\".join("&".join(f"x_{{{i}{j}}}" for j in range(9)) for i in range(9)) + r"\end{vmatrix}"
"""A determinant that sympy cannot expand in time."""


@pytest.fixture
def pool():
    pool = Pool(1)
    list(pool.judge(iter([("1", "1")]), None, 10))  # its start is no part of the tests
    yield pool
    pool.close()


def ask(pool, *pairs, seconds=10.0):
    replies = [reply for _, reply in pool.judge(iter(pairs), None, seconds)]
    return [str(reply) if isinstance(reply, TimedOut) else reply[0] for reply in replies]


def processes(worker):
    """The guardian and its forks."""
    found = subprocess.run(["ps", "-o", "pid=", "-g", str(worker.process.pid)], capture_output=True, text=True)
    return {int(line) for line in found.stdout.split()}


def test_one_that_overruns_is_killed_and_the_rest_is_answered(pool):
    (lent,) = pool._idle
    judge, began = lent.judge, time.monotonic()
    pairs = [(r"\sqrt{8}", r"2\sqrt2"), (SLOW, "1"), (r"\sqrt{8}", r"3\sqrt2"), (SLOW, "2"), ("1", "1.0")]
    assert ask(pool, *pairs, seconds=0.5) == ["right", "CPU time", "wrong", "CPU time", "right"]
    assert time.monotonic() - began < 4
    assert pool._idle == [lent]
    assert lent.judge != judge
    assert processes(lent) == {lent.process.pid, lent.judge}


def test_one_that_hangs_without_computing_is_killed(pool):
    (lent,) = pool._idle
    judge = lent.judge
    os.kill(judge, signal.SIGSTOP)
    assert ask(pool, ("1", "1.0"), ("2", "2.0"), seconds=0.2) == ["wall clock", "right"]
    assert lent.judge != judge


def test_verdicts_stay_with_their_pairs_whoever_dies():
    pool, stop = Pool(1), threading.Event()
    ask(pool, ("1", "1.0"))
    (lent,) = pool._idle

    def shoot():
        while not stop.wait(0.03):
            with contextlib.suppress(ProcessLookupError):
                os.kill(lent.judge or 2**22, signal.SIGKILL)  # no process has that number

    gun = threading.Thread(target=shoot)
    gun.start()
    replies = ask(pool, *[(str(k), f"{k + k % 2}.0") for k in range(3000)])
    stop.set()
    gun.join()
    pool.close()
    judged = [(k, reply) for k, reply in enumerate(replies) if reply not in ("worker died", "wall clock")]
    assert 1000 < len(judged) < 3000
    assert all(reply == ("wrong" if k % 2 else "right") for k, reply in judged)


def test_one_that_dies_is_replaced(pool):
    (lent,) = pool._idle
    os.kill(lent.judge, signal.SIGKILL)
    assert ask(pool, ("1", "1.0"), ("2", "2.0")) in (["worker died", "right"], ["right", "right"])
    os.killpg(lent.process.pid, signal.SIGKILL)
    assert ask(pool, ("1", "1.0"), ("2", "2.0")) == ["worker died", "right"]
    assert processes(lent) == {lent.process.pid, lent.judge}


def test_replaced_after_many(pool, monkeypatch):
    monkeypatch.setattr(pool_module, "RECYCLE", 20)
    (lent,) = pool._idle
    judge = lent.judge
    assert ask(pool, *[(str(k), f"{k}.0") for k in range(70)]) == ["right"] * 70
    assert lent.judge != judge


def test_left_in_the_middle_it_is_killed(pool):
    (lent,) = pool._idle
    replies = pool.judge(iter([("1", "1.0"), (SLOW, "1")]), None, 10)
    next(replies)
    replies.close()
    assert lent.process.poll() is not None
    assert ask(pool, ("1", "1.0")) == ["right"]


def test_close_leaves_no_process_and_no_descriptor():
    before = set(Path("/proc/self/fd").iterdir())
    pool = Pool(2)
    ask(pool, ("1", "1.0"), (SLOW, "1"), seconds=0.3)
    (lent,) = pool._idle
    group = processes(lent)
    assert len(group) == 2
    pool.close()
    deadline = time.monotonic() + 5
    while processes(lent) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not processes(lent)
    assert set(Path("/proc/self/fd").iterdir()) == before


def test_a_killed_caller_leaves_no_orphan():
    code = (
        "import time; from rftt_lightning.answers.pool import Pool; p = Pool(1)\n"
        "list(p.judge(iter([('1', '1.0')]), None, 10)); print(p._idle[0].process.pid, flush=True); time.sleep(60)"
    )
    caller = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    guardian = int(caller.stdout.readline())
    caller.kill()
    caller.wait()
    caller.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            os.killpg(guardian, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("the worker outlives its caller")


def test_self_test_refuses_a_checker_that_errs(pool, monkeypatch):
    assert worker.self_test() == ""
    monkeypatch.setattr(worker, "KNOWN", [*worker.KNOWN, ("2", "3", True)])
    assert worker.self_test() == "3 for 2 is wrong by rational"
    (lent,) = pool._idle
    lent.judge, lent._buffer = 0, b'{"broken": "3 for 2 is right"}\n'
    with pytest.raises(BrokenChecker, match="3 for 2"):
        ask(pool, ("1", "1.0"))


@pytest.mark.parametrize("text", ["7^{99999999999}", "99999999!", "7^{7^{12}}+x"])
def test_even_past_the_guards_a_worker_is_bounded(text, monkeypatch):
    """Straight to sympy, past the size checks: memory and time are limited there too."""
    pool = Pool(1)
    code = "import sys; from rftt_lightning.answers import equal, worker; equal._too_large = lambda node: False; sys.exit(worker.main())"
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda args, **how: popen([args[0], "-c", code], **how))
    ask(pool, ("1", "1.0"))
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(0.02):
            with contextlib.suppress(OSError, StopIteration), open(f"/proc/{lent.judge}/status") as file:
                peak.append(next(int(line.split()[1]) for line in file if line.startswith("VmHWM")))

    lent = pool._idle[0]
    watcher = threading.Thread(target=watch)
    watcher.start()
    began = time.monotonic()
    assert ask(pool, (text, r"\sqrt2"), seconds=1.0)[0] != "right"
    assert time.monotonic() - began < 3
    assert ask(pool, (r"\sqrt{8}", r"2\sqrt2")) == ["right"]
    done.set()
    watcher.join(5)
    pool.close()
    assert max(peak) * 1024 <= BYTES


def test_time_out_is_a_verdict_of_its_own(monkeypatch):
    gold, response = r"\sqrt{3}+\ln 7", r"\boxed{\ln 7 - \sqrt{5}}"
    with monkeypatch.context() as patch:
        patch.setattr(
            POOL, "judge", lambda pairs, kind, seconds, stop=None: [(q, TimedOut("wall clock")) for q in pairs]
        )
        late = verify(gold, response)
        assert (late.status, late.answer, late.rule) == (Status.TIMED_OUT, r"\ln 7 - \sqrt{5}", "wall clock")
        assert [v.status for v in verify_many([(gold, response)] * 2)] == [Status.TIMED_OUT] * 2
    assert verify(gold, response).status is Status.WRONG  # the time-out was not remembered


def test_plain_answers_need_no_worker(monkeypatch):
    def refuse(*args):
        raise AssertionError("a worker was asked")

    monkeypatch.setattr(POOL, "judge", refuse)
    for gold, answer in [
        ("1,000", "1000"),
        (r"\frac12", "0.5"),
        ("3", "4"),
        ("(x+1)^2", "x^2+2x+1"),
        (r"2\pi", r"\pi\cdot 2"),
        ("x>3", r"(3,\infty)"),
    ]:
        assert verify(gold, rf"\boxed{{{answer}}}").right == (gold != "3")


def test_equal_questions_are_decided_once(monkeypatch):
    asked = []
    judge = POOL.judge

    def count(pairs, kind, seconds, stop=None):
        for question, reply in judge(pairs, kind, seconds, stop):
            asked.append(question)
            yield question, reply

    monkeypatch.setattr(POOL, "judge", count)
    pairs = [(r"\sqrt{11}+3", r"\boxed{3+\sqrt{11}}"), (r"\sqrt{11}+3", r"so \boxed{3+\sqrt{11}}.")] * 5 + [
        ("1", r"\sqrt{11}")
    ]
    first = verify_many(pairs)
    assert [v.right for v in first] == [True] * 10 + [False]
    assert len(asked) == 3  # two texts that state one answer are one question in a worker, and here two
    assert verify_many(pairs) == first
    assert len(asked) == 3
    assert [verify(*pair) for pair in pairs] == first
    assert len(asked) == 5


@pytest.mark.parametrize("workers", [1, 2])
def test_what_is_forgotten_during_a_batch_is_still_returned(workers, monkeypatch):
    monkeypatch.setattr("rftt_lightning.answers.memory.REMEMBERED", 4)
    pairs = [(str(k), f"{k}.0") for k in range(100, 130)]
    verify_many(pairs[:3], workers=workers)
    assert all(verdict.right for verdict in verify_many(pairs, workers=workers))


def test_sympy_is_not_imported_by_the_caller():
    code = (
        "import sys; from rftt_lightning.answers import verify; assert verify('1/2', '0.5').right;"
        "assert verify('x^2', 'x*x').right; assert 'sympy' not in sys.modules; assert 'torch' not in sys.modules"
    )
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


def test_from_an_event_loop():
    async def check(k):
        return await asyncio.to_thread(verify, rf"\sqrt{{{k * k * 13}}}", rf"{k}\sqrt{{13}}")

    async def check_all():
        return await asyncio.gather(*map(check, range(2, 8)))

    assert all(verdict.right for verdict in asyncio.run(check_all()))


def in_child(queue):
    queue.put((os.getpid(), verify(r"\sqrt{18}", r"3\sqrt2").right, verify(r"\sqrt{18}", r"2\sqrt3").right))


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_after_fork_and_spawn_from_a_daemon(method):
    assert verify(r"\sqrt{50}+1", r"1+5\sqrt2").right
    mine = {worker.process.pid for worker in POOL._idle}
    context = multiprocessing.get_context(method)
    queue = context.Queue()
    process = context.Process(target=in_child, args=(queue,), daemon=True)
    process.start()
    pid, right, wrong = queue.get(timeout=60)
    process.join(60)
    assert (right, wrong) == (True, False)
    assert pid != os.getpid()
    assert {worker.process.pid for worker in POOL._idle} == mine
    assert all(worker.process.poll() is None for worker in POOL._idle)
    assert verify(r"\sqrt{98}+1", r"1+7\sqrt2").right


def test_the_cheap_prover_gives_up_on_long_lists():
    from rftt_lightning.answers.decide import decide
    from rftt_lightning.answers.equal import Unproven

    one = ",".join(rf"\{{{k},{k + 1}\}}" for k in range(60))
    two = ",".join(rf"\{{{k},{k + 2}\}}" for k in range(60))
    with pytest.raises(NeedsProof):
        decide(rf"\{{{one}\}}", rf"\{{{two}\}}", Unproven())


def test_a_fault_of_the_checker_is_a_verdict(monkeypatch):
    def fail(*args):
        raise ZeroDivisionError("a bug")

    monkeypatch.setattr("rftt_lightning.answers.checker.decide", fail)  # in this process; workers have their own
    assert verify(r"\sqrt{19}+1", r"\boxed{1+\sqrt{19}}").right
