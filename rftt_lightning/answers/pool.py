"""Worker processes that judge with sympy and can be killed: no comparison can hang, crash or exhaust its caller.

A worker (:mod:`rftt_lightning.answers.worker`) reads a JSON line of pairs and writes a JSON line a verdict. It serves any
thread, daemonic processes, and processes after fork or spawn: a forked child forgets its parent's workers and starts its
own. A worker that dies of its CPU or memory limit, or overruns its wall clock and is killed, is replaced; the pair it was at
is known to have no verdict, and the pairs after it are asked again.
"""

from __future__ import annotations

import atexit
import contextlib
import itertools
import json
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

START_SECONDS = 60.0
"""Longest wait for a worker to import sympy and pass its self-test; not charged to the pair."""
PATIENCE = 3.0
"""Wall-clock limit of a pair over its CPU seconds: a worker that waits for a busy machine is no worker that hangs."""
CHUNK = 64
"""Pairs in one request."""
RECYCLE = 20_000
"""Pairs after which a judge is replaced: what sympy remembers does not grow without end."""

P = TypeVar("P", bound="Pair")
Pair = tuple[str, str | None]
"""Gold and response."""


class TimedOut(Exception):
    """A worker was killed (wall clock, CPU, memory): nothing is known about the pair."""


class BrokenChecker(RuntimeError):
    """The checker's self-test failed on this machine: no verdict of it can be trusted."""


class Worker:
    """One worker process: a guardian that imported sympy, and its fork that judges and may be killed at any time."""

    def __init__(self, module: str) -> None:
        self.module = module
        self.start()

    def start(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", self.module],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            start_new_session=True,  # Ctrl-C is for the caller; and the whole group can be killed
            bufsize=0,
        )
        self.judge = 0  # process id of the fork that judges; 0 while it is not up
        self.judged = 0  # pairs that were put to it
        self.request = 0  # number of the last request
        self._selector = selectors.DefaultSelector()
        self._selector.register(self.process.stdout, selectors.EVENT_READ)  # type: ignore[arg-type]
        self._buffer = b""

    def wait_until_up(self) -> None:
        """Raises :class:`TimedOut` if it does not come up, :class:`BrokenChecker` if its self-test failed."""
        deadline = time.monotonic() + START_SECONDS
        while not self.judge:
            line = self._line(deadline)
            if "broken" in line:
                raise BrokenChecker(f"the answer checker fails its self-test here: {line['broken']}")
            if "judge" in line:  # other lines are verdicts of a killed predecessor
                self.judge, self.judged = line["judge"], 0

    def ask(self, pairs: Sequence[Pair], kind: str | None, seconds: float) -> Iterator[list[Any]]:
        """Verdicts as [status, answer, gold, rule, forms], in order; raises :class:`TimedOut` at the first pair that has none. ``seconds`` of CPU
        for each pair."""
        if self.judged > RECYCLE:
            self.replace_judge()
        self.wait_until_up()
        self.judged += len(pairs)
        assert self.process.stdin is not None
        self.request += 1
        line = memoryview(json.dumps([self.request, seconds, kind, *pairs]).encode() + b"\n")
        try:
            while line:
                line = line[self.process.stdin.write(line) :]
        except OSError as error:
            self.judge = 0
            raise TimedOut("worker died") from error
        waited = len(pairs)
        while waited:
            request, *replies = self._line(time.monotonic() + PATIENCE * seconds)
            if request == self.request:  # a successor may still answer what its predecessor was asked
                waited -= len(replies)
                yield from replies

    def _line(self, deadline: float) -> Any:
        assert self.process.stdout is not None
        while b"\n" not in self._buffer:
            if not self._selector.select(max(0.0, deadline - time.monotonic())):
                raise TimedOut("wall clock")
            part = os.read(self.process.stdout.fileno(), 1 << 16)
            if not part:
                self.judge = 0
                raise TimedOut("worker died")
            self._buffer += part
        line, _, self._buffer = self._buffer.partition(b"\n")
        reply = json.loads(line)
        if self.judge and "judge" in reply:  # it died and was forked anew by its guardian
            self.judge = reply["judge"]
            raise TimedOut(reply["cause"])
        return reply

    def replace_judge(self) -> None:
        """Kill the fork that judges; the guardian forks another in a few milliseconds."""
        if self.judge:  # 0 would be our own process group
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.judge, signal.SIGKILL)
        self.judge, self._buffer = 0, b""
        self.wait_until_up()

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.forget()

    def forget(self) -> None:
        """Close our ends; the process, if it is ours, sees that and leaves."""
        self._selector.close()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Pool:
    """At most ``size`` workers of one ``module``, started when first needed; usable from any thread."""

    def __init__(self, size: int | None = None, module: str = "rftt_lightning.answers.worker") -> None:
        self.module = module
        self.size = size or max(2, os.cpu_count() or 1)
        self._idle: list[Worker] = []
        self._lent: list[Worker] = []
        self._lock = threading.Lock()
        self._free = threading.Semaphore(self.size)
        self._warming = False

    def warm_up(self) -> None:
        """Let a first worker import sympy while the caller goes on."""
        if not self._warming:
            with self._lock:
                if not self._warming:
                    self._warming = True
                    self._idle.append(Worker(self.module))

    @contextlib.contextmanager
    def worker(self) -> Iterator[Worker]:
        """Lend a worker. One that is left in the middle of a request is killed: it is no use to the next."""
        with self._free:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            worker = worker or Worker(self.module)
            self._lent.append(worker)
            try:
                yield worker
            except BaseException:
                worker.kill()
                raise
            finally:
                self._lent.remove(worker)
            with self._lock:
                self._idle.append(worker)

    def judge(
        self, pairs: Iterator[P], kind: str | None, seconds: float, stop: threading.Event | None = None
    ) -> Iterator[tuple[P, list[Any] | TimedOut]]:
        """Pairs with their verdicts, from one worker; one without verdict has the :class:`TimedOut` that says why.

        ``pairs`` may be shared with other threads: a chunk is taken when the last is done. ``stop`` ends it after a pair.
        """
        with self.worker() as worker:
            while chunk := list(itertools.islice(pairs, CHUNK)):
                while chunk and not (stop and stop.is_set()):
                    done = 0
                    try:
                        for reply in worker.ask(chunk, kind, seconds):
                            done += 1
                            yield chunk[done - 1], reply
                    except TimedOut as reason:
                        self._recover(worker, reason)
                        done += 1
                        yield chunk[done - 1], reason
                    chunk = chunk[done:]

    def _recover(self, worker: Worker, reason: TimedOut) -> None:
        try:
            if str(reason) == "wall clock":  # else its guardian has forked another
                worker.replace_judge()
            worker.wait_until_up()
        except TimedOut:  # the guardian is gone, too (killed by the system, say)
            worker.kill()
            worker.start()

    def close(self) -> None:
        with self._lock:
            idle, self._idle, self._warming = self._idle, [], False
        for worker in idle:
            worker.kill()

    def forget(self) -> None:
        """In a forked child: the parent's workers are not ours to use or kill."""
        for worker in (*self._idle, *self._lent):
            worker.forget()
            worker.process.returncode = 0  # not our child: spare Popen's warning
        self.__init__(self.size, self.module)  # type: ignore[misc]


POOL = Pool()
SECOND = Pool(module="rftt_lightning.answers.second")
for _pool in (POOL, SECOND):
    atexit.register(_pool.close)
    os.register_at_fork(after_in_child=_pool.forget)
