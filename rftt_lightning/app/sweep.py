"""``rftt sweep``: commands that build on each other, over seeds, side by side; an interrupted one goes on where it was."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import string
import subprocess
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

from filelock import FileLock, Timeout
from rich.live import Live
from rich.table import Table

from rftt_lightning.app.command import interruptible, make_folder, named_configs, run_command, write_json
from rftt_lightning.core.contracts import UserError

POLL = 0.2
"""Seconds between looks at the commands that run."""

TAKEN = ("here", "out", "seed", "logs")
"""What a stage may not be called."""

PROGRAMS = {"rftt": (sys.executable, "-m", "rftt_lightning"), "python": (sys.executable,)}
"""What the first word of a command may be, and what it stands for."""


def sweep(
    stages: dict[str, str],
    out: str = "runs/sweep",
    seeds: list[int] = [0],  # noqa: B006  jsonargparse shows the default
    variables: dict[str, str | int | float] = {},  # noqa: B006
    lanes: int = 2,
    threads: int = 1,
    show: list[str] = [],  # noqa: B006
    only: list[str] = [],  # noqa: B006
    again: list[str] = [],  # noqa: B006
    plan: bool = False,
) -> None:
    """Run a plan of commands, each once what it builds on is done; what is done is not run again.

    In a command ``$here`` is the stage's own folder, ``$sft`` that of the stage ``sft``, which then must come first, ``$seed`` the
    seed. A name among ``variables`` stands for that text, which may be several words and name stages and variables itself. A stage
    runs once for each seed if it, or what it builds on, names the seed, in ``out/seed-N/STAGE``; else once for all, in
    ``out/STAGE``. A stage that names ``$out`` comes after all that do not, and is run again when one of them was.

    When a command fails, what builds on it is left out and the rest goes on; the exit status is then 1. Ctrl-C and SIGTERM are
    passed on to the commands, which save what they have; a second one kills them. Commands that outlive a sweep which was killed
    itself are named by the next one, which begins nothing beside them.

    Args:
        stages: name -> command line, whose first word is rftt or python; run without a shell.
        out: folder of all stages; logs/ has what they print, stages.json what is done and in how many seconds.
        seeds: of the stages that name the seed.
        variables: name -> text, in quotes where it is one word with spaces in it.
        lanes: commands side by side; threads: CPU threads of each.
        show: stages whose output is printed at the end.
        only: stages to be run, with what they build on; empty is all.
        again: stages to be run anew, and all that builds on them, as after a change of settings; what they wrote is deleted.
        plan: print the commands and stop.
    """
    if not stages:
        raise UserError("stages is empty; give name: command line, for one or more")
    for name, value in (("lanes", lanes), ("threads", threads)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    for name in (*show, *only, *again):
        if name not in stages:
            raise UserError(f"show, only and again name stages; {name!r} is none of {', '.join(stages)}")
    every = expand(stages, Path(out), seeds, variables)
    runs = _wanted(every, only)
    if left := [stage for stage in again if stage not in {run.stage for run in runs}]:
        raise UserError(f"again names {left[0]}, which only leaves out; name it there, too")
    if plan:
        print("\n".join(shlex.join(run.args) for run in runs))
        return
    sweeper = Sweeper(Path(out), runs, lanes, threads)
    sweeper.run(anew=_above(every, again), last=[run.name for run in every if run.last])
    for run in runs:
        if run.stage in show and run.name in sweeper.done:
            print(sweeper.log(run.name).read_text(encoding="utf-8", errors="replace"), end="")
    if sweeper.failed:
        raise SystemExit(1)


@dataclass(frozen=True)
class Run:
    """A stage for one seed; ``needs`` are the names of the runs whose files it reads. One that is ``last`` reads what is there of
    all others, too."""

    name: str
    stage: str
    args: tuple[str, ...]
    needs: tuple[str, ...]
    last: bool = False

    @property
    def digest(self) -> str:
        """Of the command line, and the configs that it names, as they are now."""
        digest = hashlib.sha256("\0".join(self.args).encode())
        for path in named_configs(self.args):
            with contextlib.suppress(OSError):  # the command itself says so
                digest.update(Path(path).read_bytes())
        return digest.hexdigest()[:16]


def expand(
    stages: Mapping[str, str], out: Path, seeds: Sequence[int], variables: Mapping[str, str | int | float]
) -> list[Run]:
    """Every stage, for every seed if it hangs on the seed. Raises :class:`UserError` for names that mean
    nothing, for variables that are named nowhere, and for stages that need each other."""
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"seeds is {list(seeds)}; give one or more, each once")
    for stage in stages:  # a folder's name, which --again deletes
        if not re.fullmatch(r"[a-z_]\w*", stage, re.ASCII | re.IGNORECASE) or stage in TAKEN:
            raise UserError(f"stage {stage!r}: give it a name of letters, digits and _, none of {', '.join(TAKEN)}")
    texts = [*stages.values(), *map(str, variables.values())]
    stages = {stage: _filled(stage, line, variables) for stage, line in stages.items()}
    names = {stage: _names(stage, line) for stage, line in stages.items()}
    last = {stage for stage in stages if "out" in names[stage]}
    needs = {stage: [other for other in stages if other in names[stage]] for stage in stages}
    if early := next((s for s in stages if s not in last and last.intersection(needs[s])), None):
        raise UserError(f"stage {early} builds on one that names $out, so comes after it; let it name $out, too")
    seeded: set[str] = set()
    for stage in _ordered(needs):
        if "seed" in names[stage] or seeded.intersection(needs[stage]):
            seeded.add(stage)

    def name(stage: str, seed: int) -> str:
        return f"seed-{seed}/{stage}" if stage in seeded else stage

    runs = []
    for stage in stages:
        for seed in seeds if stage in seeded else seeds[:1]:
            known = {other: str(out / name(other, seed)) for other in stages}
            known |= {"here": known[stage], "out": str(out), "seed": str(seed)}
            try:
                args = tuple(string.Template(word).substitute(known) for word in shlex.split(stages[stage]))
            except KeyError as error:
                raise UserError(
                    f"stage {stage}: ${error.args[0]} is no stage, none of variables ({', '.join(variables)}), nor here, out, seed"
                ) from error
            runs.append(
                Run(name(stage, seed), stage, args, tuple(name(need, seed) for need in needs[stage]), stage in last)
            )
    named = {name for text in texts for name in string.Template(text).get_identifiers()}
    for variable in variables:
        if variable not in named:
            known = ", ".join(name for name in variables if name in named) or "none"
            raise UserError(f"variables.{variable}: no stage and no other variable names it; those named are {known}")
    return runs


def _filled(stage: str, line: str, variables: Mapping[str, str | int | float]) -> str:
    """The command with the text of its variables, and of those that they name."""
    for _ in range(len(variables) + 1):
        before = line
        line = string.Template.pattern.sub(lambda m: str(variables.get(m["named"] or m["braced"] or "", m[0])), line)
        if line == before:
            return line
    raise UserError(f"stage {stage}: variables name each other: {line!r}")


def _names(stage: str, line: str) -> set[str]:
    """What a command names. Raises :class:`UserError` if it cannot be run."""
    try:
        words = shlex.split(line)
    except ValueError as error:
        raise UserError(f"stage {stage}: {error}: {line!r}") from error
    if not words or words[0] not in PROGRAMS:
        raise UserError(f"stage {stage} must begin with {' or '.join(PROGRAMS)}: {line!r}")
    template = string.Template(line)
    if not template.is_valid():
        raise UserError(f"stage {stage}: a $ must stand before a name, or be written $$: {line!r}")
    return set(template.get_identifiers())


def _ordered(needs: Mapping[str, Sequence[str]]) -> list[str]:
    try:
        return list(TopologicalSorter(needs).static_order())
    except CycleError as error:
        raise UserError(f"stages need each other: {' <- '.join(error.args[1])}") from error


def _wanted(runs: Sequence[Run], only: Sequence[str]) -> list[Run]:
    """The runs of the stages ``only`` and what they build on; all if it is empty."""
    needs = {run.name: run.needs for run in runs}
    waiting = [run.name for run in runs if not only or run.stage in only]
    wanted: set[str] = set()
    while waiting:
        name = waiting.pop()
        if name not in wanted:
            wanted.add(name)
            waiting += needs[name]
    return [run for run in runs if run.name in wanted]


def _above(runs: Sequence[Run], stages: Sequence[str]) -> list[str]:
    """The runs of these stages and all that build on them."""
    found = {run.name for run in runs if run.stage in stages}
    while more := {run.name for run in runs if found.intersection(run.needs)} - found:
        found |= more
    return [run.name for run in runs if run.name in found]


class Sweeper:
    """Runs what is ready, ``lanes`` commands at a time. What was run, whether it is done and its seconds, interrupted runs
    included, are kept in ``stages.json``, and the pid of what runs. A command and all that it starts hold a lock on its log, to
    which they write, as long as one of them lives."""

    def __init__(self, out: Path, runs: list[Run], lanes: int, threads: int) -> None:
        self.out, self.runs, self.lanes, self.threads = out, runs, lanes, threads
        self.record = out / "stages.json"
        self.done: dict[str, str] = {}
        self.seconds: dict[str, float] = {}
        self.total = 0.0
        self.failed: list[str] = []
        self.running: dict[str, tuple[subprocess.Popen[bytes], float, str]] = {}
        """Name -> process, when it began, and the digest of then: a config that is edited meanwhile was not run."""

    def run(self, anew: Sequence[str], last: Sequence[str]) -> None:
        """Run what is not done. ``anew`` names runs that are to be run again, ``last`` all those that read what others wrote, so
        are run again if others are. Raises :class:`UserError` if another sweep works in the folder, or commands of one that was
        killed, or if something was done with other settings."""
        make_folder(self.out)
        lock = FileLock(self.out / ".lock")
        try:
            lock.acquire(blocking=False)
        except Timeout as error:
            raise UserError(f"another sweep works in {self.out}; wait for it, or give another --out") from error
        with lock:
            self.read()
            fresh = set(anew)
            if any(run.name in fresh or run.name not in self.done for run in self.runs if not run.last):
                fresh |= set(last)
            for run in self.runs:
                if run.name not in fresh and self.done.get(run.name, run.digest) != run.digest:
                    raise UserError(
                        f"{run.name} of {self.out} was run with other settings; give another --out, or --again "
                        f"[{run.stage}], which deletes it and what builds on it"
                    )
            self.forget(fresh)
            for name in anew:
                shutil.rmtree(self.out / name, ignore_errors=True)
            self.work()
        for name in self.failed:
            print(f"{name} failed; its output is in {self.out / 'logs'}", file=sys.stderr)

    def read(self) -> None:
        """What earlier calls wrote down."""
        try:
            known = json.loads(self.record.read_text(encoding="utf-8")) if self.record.exists() else {}
        except ValueError as error:
            raise UserError(f"{self.record} is damaged: {error}; delete it, and every stage is run again") from error
        self.seconds, self.total = known.get("seconds", {}), known.get("total", 0.0)
        self.done = known.get("done", {})
        pids = {self.log(name): pid for name, pid in known.get("running", {}).items()}
        if left := {log.stem: pids.get(log, "?") for log in sorted(self.out.glob("logs/*.log")) if held(log)}:
            named = ", ".join(f"{name} (pid {pid})" for name, pid in left.items())
            raise UserError(
                f"commands of a sweep that was killed still run in {self.out}: {named}; wait for them, or end them and all "
                f"that they started: kill -- {' '.join(f'-{pid}' for pid in left.values())}"
            )

    def forget(self, names: Collection[str]) -> None:
        """Write down that these runs are not done any more."""
        for name in names:
            self.done.pop(name, None)
            self.seconds.pop(name, None)
        self.write()

    def work(self) -> None:
        """Begin what is ready and wait for it, until nothing is."""
        live = Live(
            self.picture(), refresh_per_second=1, get_renderable=self.picture, transient=not sys.stdout.isatty()
        )
        # SIGINT, too: a process that was started in the background would not hear of it.
        with interruptible(signal.SIGTERM, signal.SIGINT), live:
            self.began = time.monotonic()
            try:
                while self.start() or self.running:
                    time.sleep(POLL)
                    self.collect()
            finally:
                self.end()

    def end(self) -> None:
        """Ask what runs to end, and wait for it; a second signal kills it."""
        processes = [process for process, *_ in self.running.values()]
        try:
            for process in processes:
                process.terminate()
            if processes:
                print(
                    f"waiting for {', '.join(self.running)}; another Ctrl-C kills what still runs",
                    file=sys.stderr,
                    flush=True,
                )
            for process in processes:
                process.wait()
        except KeyboardInterrupt:
            for process in processes:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            raise
        finally:
            self.note(list(self.running))

    def start(self) -> int:
        """Begin what is ready as far as there are lanes; returns how many began."""
        over = {*self.done, *self.running, *self.failed}
        rest = any(run.name not in self.done for run in self.runs if not run.last)
        ready = [
            run
            for run in self.runs
            if run.name not in over and all(need in self.done for need in run.needs) and not (run.last and rest)
        ]
        ready = ready[: self.lanes - len(self.running)]
        for run in ready:
            log = self.log(run.name)
            log.parent.mkdir(parents=True, exist_ok=True)
            digest = run.digest
            env = {**os.environ, "OMP_NUM_THREADS": str(self.threads), "COLUMNS": "110"}
            command = [*PROGRAMS[run.args[0]], *run.args[1:]]
            with log.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.truncate(0)
                # A session of its own: Ctrl-C reaches the sweep alone, which then ends its commands once.
                process = subprocess.Popen(command, stdout=file, stderr=file, env=env, start_new_session=True)
            self.running[run.name] = process, time.monotonic(), digest
            self.write()
        return len(ready)

    def collect(self) -> None:
        """Take note of what has ended."""
        ended = {name: process for name, (process, *_) in self.running.items() if process.poll() is not None}
        for run in self.runs:
            if run.name not in ended:
                continue
            if code := ended[run.name].returncode:
                self.failed.append(run.name)
                tail = self.log(run.name).read_text(encoding="utf-8", errors="replace").splitlines()[-15:]
                print(f"{run.name} failed with exit status {code}:", *tail, sep="\n  ", file=sys.stderr, flush=True)
            else:
                self.done[run.name] = self.running[run.name][2]
        self.note(list(ended))
        for name in ended:
            del self.running[name]
            if name in self.done and not sys.stdout.isatty():  # where no picture is drawn
                print(f"{name}: done in {self.seconds[name]:.0f} s", flush=True)

    def note(self, names: Sequence[str]) -> None:
        """Write down the seconds of runs that have ended or are interrupted, and those of all."""
        if not names:
            return
        now = time.monotonic()
        self.seconds |= {name: round(self.spent(name), 1) for name in names}
        self.total, self.began = round(self.total + now - self.began, 1), now
        self.write()

    def write(self) -> None:
        running = {name: process.pid for name, (process, *_) in self.running.items() if process.returncode is None}
        known = {"done": self.done, "seconds": self.seconds, "total": self.total, "running": running}
        write_json(self.record, known)

    def spent(self, name: str) -> float:
        now = time.monotonic()
        began = self.running[name][1] if name in self.running else now
        return self.seconds.get(name, 0.0) + now - began

    def log(self, name: str) -> Path:
        return self.out / "logs" / f"{name.replace('/', '-')}.log"

    def picture(self) -> Table:
        counts = f"{len(self.done)} of {len(self.runs)} done" + (f", {len(self.failed)} failed" if self.failed else "")
        table = Table("running", "seconds", "", title=f"rftt sweep: {counts}", width=110)
        for run in self.runs:
            if run.name in self.running:
                table.add_row(run.name, f"{self.spent(run.name):.0f}", last_line(self.log(run.name)))
        return table


def held(log: Path) -> bool:
    """Does what writes a log still run?"""
    with log.open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def last_line(log: Path) -> str:
    """The newest line of a log, progress bars included."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip()[:80] for line in reversed(lines) if line.strip()), "")


def main(args: list[str]) -> int | None:
    return run_command(sweep, args, "rftt sweep")
