"""Worker processes that prove with sympy and can be killed: no comparison can hang or exhaust its caller.

A worker is a plain subprocess (``python -m rftt_lightning.answers.prover``) that reads one JSON line and writes one. It
works from any thread, from daemonic processes and after fork or spawn: a forked child forgets its parent's workers and
starts its own. A worker that overruns its wall clock, dies, or outgrows its memory is killed and replaced.
"""

from __future__ import annotations

import atexit
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from rftt_lightning.answers.parse import Node

START_SECONDS = 60.0
"""Longest wait for a worker to import sympy; not charged to the question."""


class TimedOut(Exception):
    """A worker was killed (wall clock, CPU, memory): nothing is known about the question."""


def to_json(node: Node) -> list[Any]:
    return [node.op, node.value, [to_json(arg) for arg in node.args]]


class _Worker:
    def __init__(self) -> None:
        root = str(Path(__file__).resolve().parents[2])
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rftt_lightning.answers.prover"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, "PYTHONPATH": path},
            bufsize=0,
        )
        try:
            self._read(time.monotonic() + START_SECONDS)  # the greeting
        except TimedOut:
            self.kill()
            raise

    def ask(self, line: bytes, seconds: float) -> Any:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(line)
        except OSError as error:
            raise TimedOut("worker died") from error
        return json.loads(self._read(time.monotonic() + seconds))

    def _read(self, deadline: float) -> bytes:
        assert self.process.stdout is not None
        data = b""
        with selectors.DefaultSelector() as selector:
            selector.register(self.process.stdout, selectors.EVENT_READ)
            while not data.endswith(b"\n"):
                if not selector.select(max(0.0, deadline - time.monotonic())):
                    raise TimedOut("wall clock")
                part = os.read(self.process.stdout.fileno(), 65536)
                if not part:
                    raise TimedOut("worker died")
                data += part
        return data

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.close()

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()


class Provers:
    """A pool of at most ``size`` workers, started when first needed; ``ask`` may be called from any thread."""

    def __init__(self, size: int = 4) -> None:
        self.size = size
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()
        self._free = threading.Semaphore(size)

    def ask(self, question: str, nodes: list[Node], seconds: float) -> Any:
        """Put a question of :mod:`rftt_lightning.answers.prover`. Raises :class:`TimedOut`; never blocks much longer than
        ``seconds`` after a worker is free (its start apart)."""
        line = json.dumps([question, [to_json(node) for node in nodes], seconds]).encode() + b"\n"
        with self._free:
            with self._lock:
                worker = self._idle.pop() if self._idle else None
            worker = worker or _Worker()
            try:
                answer = worker.ask(line, seconds)
            except BaseException:  # also when interrupted: a worker in the middle of a question is no use to the next
                worker.kill()
                raise
            with self._lock:
                self._idle.append(worker)
            return answer

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, []
        for worker in idle:
            worker.kill()

    def forget(self) -> None:
        """In a forked child: the parent's workers are not ours to use or kill."""
        for worker in self._idle:
            worker.close()
            worker.process.returncode = 0  # not our child: spare Popen's warning
        self.__init__(self.size)  # type: ignore[misc]


PROVERS = Provers()
atexit.register(PROVERS.close)
os.register_at_fork(after_in_child=PROVERS.forget)
