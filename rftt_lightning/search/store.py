"""Stores of trees and trajectories: a folder with ``manifest.json`` and JSONL shards, one whole record a line. No pickle.

Trees are appended one by one (:class:`Store`). A record counts once its line is complete, so a run that is killed loses at
most the record being written, and a reader never sees half a one. The shard being written is plain text
(``trees-00002.jsonl``); a full one is compressed (``trees-00001.jsonl.gz``): written under a temporary name, renamed, then
the plain one deleted. Where both are there, a kill came in between, and the compressed one counts. Trajectories, and
what several stores are merged into, are written all at once, the manifest last: such a store is whole or it is none.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import re
import shutil
import subprocess
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import count, islice
from pathlib import Path
from typing import IO, Any, TypeVar, cast

from filelock import FileLock, Timeout

from rftt_lightning import __version__
from rftt_lightning.core.contracts import Trajectory, UserError
from rftt_lightning.core.paths import PACKAGE
from rftt_lightning.core.tree import Tree

MANIFEST = "manifest.json"
LOCK = "writing.lock"
FORMAT = 1
"""Of manifest and records; goes up when earlier versions of this file could not read them."""
SHARD = 1000
"""Records of a full shard."""
LEVEL = 1
"""Of compression: higher ones are slower and hardly smaller."""

Record = TypeVar("Record")


class Store:
    """An open store: ``store.add(tree.problem.id, tree.to_json())`` appends a record.

    ``Store(folder, kind, settings)`` makes the folder, or opens it where an earlier run left off: then its manifest
    must have the same kind and, if there is any record, the same settings, and what a kill left half done is mended:
    a torn last line is cut off, full shards are compressed. ``done`` maps the ids that are there to their problems
    (None in a record without one). ``version`` counts the policy updates before the run; like the source commit it is
    noted in the manifest and not compared. Raises :class:`UserError` if settings differ, naming them, if the folder
    holds another kind or format of store (which ``overwrite`` does not touch either), if another process is writing
    it, or if it cannot be written.
    """

    def __init__(
        self, folder: str | Path, kind: str, settings: Mapping[str, Any], overwrite: bool = False, version: int = 0
    ) -> None:
        self.folder, self.kind = Path(folder), kind
        self.done: dict[str, Any] = {}
        self._lock = _locked(self.folder)
        try:
            if overwrite:
                _clear(self.folder, kind)
            self._open_manifest(json.loads(json.dumps(dict(settings))), version)
            _mend(self.folder, kind)
            number = filled = 0
            for path in shards(self.folder, kind):
                known = {record["id"]: record.get("problem") for _, record in _records(path)}
                self.done |= known
                number = int(path.name.partition(".")[0].rpartition("-")[2])
                filled = SHARD if path.suffix == ".gz" else len(known)
            self._open_shard(number, filled)
        except OSError as error:
            self._lock.release()
            raise _unwritable(self.folder, error) from error
        except UserError:
            self._lock.release()
            raise

    def _open_manifest(self, settings: dict[str, Any], version: int) -> None:
        known = manifest(self.folder, self.kind)["settings"] if (self.folder / MANIFEST).exists() else None
        written = any(True for path in shards(self.folder, self.kind) for _ in _lines(path))
        if not written:  # a run that came to nothing binds none that follows
            _write_manifest(self.folder, self.kind, settings, version)
        elif known is None:
            raise UserError(
                f"{self.folder} holds {self.kind} and no {MANIFEST}; give another --out, or --overwrite true to begin anew"
            )
        elif known != settings:
            raise UserError(
                f"{self.folder} was begun with other settings ({differences(known, settings)}); give another --out, or "
                "--overwrite true to begin anew"
            )

    def _open_shard(self, number: int, filled: int) -> None:
        """Go on in the shard of this number, which holds so many records, or in the next one if it is full."""
        self._number, self._filled = (number, filled) if filled < SHARD else (number + 1, 0)
        self._file = _plain(self.folder, self.kind, self._number).open("ab")

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a record under a name that is not in the store yet. Raises :class:`UserError` if the disk does not take it."""
        if name in self.done:
            raise ValueError(f"{name} is in {self.folder} already")
        try:
            self._file.write(_line(name, record))
            self._file.flush()
            self.done[name] = record.get("problem")
            self._filled += 1
            if self._filled >= SHARD:
                full = self._file
                _seal(_plain(self.folder, self.kind, self._number))
                self._open_shard(self._number, self._filled)
                full.close()
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def close(self) -> None:
        """Make sure that all records are on the disk, and let others write."""
        try:
            with self._file:
                os.fsync(self._file.fileno())
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        finally:
            self._lock.release()


class StepStore:
    """A store of the trees that a run grows step by step, on several processes: to readers a store like any other.

    Each step and process has a shard of its own, ``trees-000012-000``, so a step can be replaced alone and nobody waits for
    another's lock; the caller has the run's. While a step's trees grow the shard is plain and holds those that are finished;
    :meth:`close_step` writes it anew in the caller's order and compressed: the same trees, the same bytes. A record also has
    ``step`` and ``policy``, the digest of the weights that wrote it: by it a run that was killed finds the trees of a step that it
    repeats. Raises :class:`UserError` where the disk takes no more, or the folder holds something else.
    """

    def __init__(self, folder: str | Path, process: int = 0) -> None:
        self.folder, self.process = Path(folder), process
        self._file: IO[bytes] | None = None

    def prepare(self, settings: Mapping[str, Any], steps: int, done: int = 0) -> None:
        """By one process, before the others begin: make the folder, or find that of a run with the same settings, whose trees of
        steps below ``steps`` stay, as do those of the ``done`` ones; these alone if it had other settings."""
        asked = json.loads(json.dumps(dict(settings)))
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            same = (self.folder / MANIFEST).exists() and manifest(self.folder, "trees")["settings"] == asked
            for path in self.folder.glob("trees-*"):
                if int(path.name.split("-")[1]) >= (max(steps, done) if same else done) or path.suffix == ".tmp":
                    path.unlink()
            if not same:  # not before others' trees are gone, or a run that is killed here would take them for its own
                _write_manifest(self.folder, "trees", asked)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def read_step(self, step: int, policy: str) -> dict[str, Tree]:
        """Whole trees of a step that this policy grew on any process, by problem."""
        found = (record for path in self._step_shards(step) for _, record in _records(path))
        return {record["problem"]["id"]: Tree.from_json(record) for record in found if record.get("policy") == policy}

    def open_step(self, step: int, policy: str) -> None:
        """Take in trees of this step from now on. Of those that are there, this process's own stay that this policy grew. To be
        called when all processes have read the step."""
        self.step, self.policy = step, policy
        try:
            own = [path for path in self._step_shards(step) if path.name.startswith(self._path.stem)]
            pairs = [pair for path in own for pair in _records(path)]
            if own:
                temporary = self._path.with_suffix(".tmp")
                _durable(temporary, [line for line, record in pairs if record.get("policy") == policy])
                temporary.replace(self._path)
                _sealed(self._path).unlink(missing_ok=True)
            self._file = self._path.open("ab")
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def add(self, tree: Tree) -> None:
        """Append a finished tree."""
        try:
            self._file.write(self._record(tree))  # type: ignore[union-attr]
            self._file.flush()  # type: ignore[union-attr]
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def close_step(self, trees: Sequence[Tree]) -> None:
        """The step has these trees of this process, and no others."""
        try:
            self._file.close()  # type: ignore[union-attr]
            temporary = self._path.with_suffix(".tmp")
            _durable(temporary, map(self._record, trees))
            temporary.replace(self._path)
            _seal(self._path)
        except OSError as error:
            raise _unwritable(self.folder, error) from error

    def tidy_step(self, processes: int) -> None:
        """By one process, when all have closed the step: what processes left that are no more goes."""
        for path in self._step_shards(self.step):
            if int(path.name.partition(".")[0].split("-")[2]) >= processes:
                path.unlink()

    @property
    def _path(self) -> Path:
        return self.folder / f"trees-{self.step:06d}-{self.process:03d}.jsonl"

    def _step_shards(self, step: int) -> list[Path]:
        return [path for path in shards(self.folder, "trees") if path.name.startswith(f"trees-{step:06d}-")]

    def _record(self, tree: Tree) -> bytes:
        name = f"{self.step}/{tree.problem.id}"
        return _line(name, {"step": self.step, "policy": self.policy, **tree.to_json()})


def describe(thing: Any, depth: int = 5) -> Any:
    """Settings of an object as JSON types, the same in every process: what a manifest holds and resuming compares. Attributes
    that begin with an underscore are no settings, nor is anything below ``depth`` objects.

    >>> describe({"final": re.compile("boxed"), "once": ("output",)})
    {'final': 'boxed', 'once': ['output']}
    """
    if thing is None or isinstance(thing, bool | int | float | str):
        return thing
    if isinstance(thing, re.Pattern):
        return thing.pattern
    if isinstance(thing, Mapping):
        return {str(key): describe(value, depth) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [describe(value, depth) for value in thing]
    public = sorted(name for name in getattr(thing, "__dict__", {}) if not name.startswith("_")) if depth else []
    return {"class": type(thing).__qualname__, **{name: describe(getattr(thing, name), depth - 1) for name in public}}


def differences(known: Any, asked: Any, name: str = "") -> str:
    """Where two settings differ: ``seed: 0 there, 1 here``, entries of mappings named by their path.

    >>> differences({"seed": 0, "expander": {"c": 2.0, "rollouts": 8}}, {"seed": 0, "expander": {"c": 1.0, "rollouts": 8}})
    'expander.c: 2.0 there, 1.0 here'
    """
    if isinstance(known, dict) and isinstance(asked, dict):
        differing = [key for key in {**known, **asked} if known.get(key) != asked.get(key)]
        return ", ".join(differences(known.get(key), asked.get(key), f"{name}.{key}".lstrip(".")) for key in differing)
    there, here = (text if len(text) <= 40 else f"{text[:37]}…" for text in (json.dumps(known), json.dumps(asked)))
    return f"{name}: {there} there, {here} here" if there != here else f"{name} differs"


def shards(folder: str | Path, kind: str) -> list[Path]:
    """The shards of a store in order, full ones compressed."""
    found: dict[str, Path] = {}
    for ending in ("jsonl", "jsonl.gz"):  # in this order: a shard that is compressed meanwhile is seen, and once
        found |= {path.name.partition(".")[0]: path for path in Path(folder).glob(f"{kind}-*.{ending}")}
    return [found[name] for name in sorted(found)]


def size(folder: str | Path, kind: str) -> int:
    """How many whole records a store has."""
    return sum(1 for path in shards(folder, kind) for _ in _lines(path))


def digest(folder: str | Path, kind: str) -> str:
    """Hexadecimal digest of a store's whole records: another one when a record is added, lost, moved or replaced; the same
    however they are distributed over shards, compressed or not."""
    content = hashlib.blake2b(digest_size=16)
    for path in shards(folder, kind):
        for line in _lines(path):
            content.update(line)
    return content.hexdigest()


def manifest(folder: str | Path, kind: str | None = None) -> dict[str, Any]:
    """The manifest of a store, of this kind if one is given; raises :class:`UserError` if the folder is none."""
    path = Path(folder) / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        what = f"store of {kind}" if kind else "store"
        raise UserError(f"{folder} is no {what}: cannot read {path.name} ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete the folder or give another") from error
    if not isinstance(data, dict) or not isinstance(data.get("settings"), dict) or "kind" not in data:
        raise UserError(f"{path} is damaged (no kind or no settings); delete the folder or give another")
    if kind and data["kind"] != kind:
        raise UserError(f"{folder} is a store of {data['kind']}, not of {kind}; give a folder of {kind}")
    if (known := data.get("format", 0)) != FORMAT:
        newer = isinstance(known, int) and known > FORMAT
        mend = "update rftt_lightning" if newer else "make it anew"
        raise UserError(f"{folder} is a store of format {known}, this version reads format {FORMAT}; {mend}")
    return data


def read_trees(folder: str | Path) -> Iterator[Tree]:
    """All whole trees of a store, in the order in which they were finished."""
    return _read(folder, "trees", Tree.from_json)


def read_trajectories(folder: str | Path) -> Iterator[Trajectory]:
    """All trajectories of a store."""
    return _read(folder, "trajectories", Trajectory.from_json)


def write_trajectories(folder: str | Path, trajectories: Iterable[Trajectory], settings: Mapping[str, Any]) -> None:
    """Write a store of trajectories, replacing an earlier one; if it is killed meanwhile, the folder is no store. A record's
    id is that of its problem and its number among the problem's. Raises :class:`UserError` as :class:`Store` does."""

    def lines() -> Iterator[bytes]:
        seen: Counter[str] = Counter()
        for trajectory in trajectories:
            name = trajectory.problem.id
            yield _line(f"{name}#{seen[name]}", trajectory.to_json())
            seen[name] += 1

    _write(Path(folder), "trajectories", lines(), settings)


def merge(out: str | Path, folders: Sequence[str | Path], overwrite: bool = False) -> int:
    """Write the records of several stores into one, in the order of ``folders``; returns how many.

    They must be of one kind and have the same settings; what trees a store of trajectories was made of may differ, and is
    left out. A record that is in several of them is kept once. Before anything is written :class:`UserError` is raised if
    settings differ, naming them, if an id has different records, or if ``out`` holds a store (unless ``overwrite``).
    """
    kind = manifest(folders[0])["kind"]
    abouts = [manifest(folder, kind) for folder in folders]
    settings = [_without_origin(about["settings"]) for about in abouts]
    for folder, asked in zip(folders, settings, strict=True):
        if asked != settings[0]:
            raise UserError(
                f"{folders[0]} and {folder} have other settings ({differences(settings[0], asked)}); merge stores of one run"
            )
    if any(Path(out).resolve() == Path(folder).resolve() for folder in folders):
        raise UserError(f"{out} is to be merged and cannot be written to; give another folder")
    if not overwrite and ((Path(out) / MANIFEST).exists() or shards(out, kind)):
        raise UserError(f"{out} holds a store already; give another folder, or --overwrite true to replace it")

    paths = [path for folder in folders for path in shards(folder, kind)]
    found: dict[str, tuple[bytes, Path]] = {}
    for path in paths:
        for line, record in _records(path):
            mark, first = found.setdefault(record["id"], (_mark(line), path))
            if mark != _mark(line):
                raise UserError(f"{first} and {path} have different records of {record['id']!r}; leave one store out")
    left = {mark for mark, _ in found.values()}

    def lines() -> Iterator[bytes]:
        for path in paths:
            for line in _lines(path):
                if (mark := _mark(line)) in left:
                    left.remove(mark)
                    yield line

    _write(Path(out), kind, lines(), settings[0], max(about.get("policy_version", 0) for about in abouts))
    return len(found)


def _without_origin(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the folder and the digest of the trees that trajectories were made of."""
    trees = settings.get("trees")
    return {**settings, "trees": {"settings": trees.get("settings")}} if isinstance(trees, dict) else settings


def _mark(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=16).digest()


# -- files ---------------------------------------------------------------------------------------------------------------


def _locked(folder: Path) -> FileLock:
    """The lock of a store, taken; the folder is made if need be."""
    lock = FileLock(folder / LOCK)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout as error:
        raise UserError(f"another process is writing {folder}; wait for it, or give another --out") from error
    except OSError as error:
        raise _unwritable(folder, error) from error
    return lock


def _clear(folder: Path, kind: str) -> None:
    """Delete a store of this kind, the manifest first; UserError if the folder holds another kind."""
    if (folder / MANIFEST).exists():
        manifest(folder, kind)
        (folder / MANIFEST).unlink()
    for old in folder.glob(f"{kind}-*.jsonl*"):
        old.unlink()


def _mend(folder: Path, kind: str) -> None:
    """Finish what a kill interrupted: cut a torn last line, delete what was sealed, seal what is full."""
    for path in folder.glob(f"{kind}-*.jsonl.gz.tmp"):
        path.unlink()
    for path in folder.glob(f"{kind}-*.jsonl"):
        if _sealed(path).exists():
            path.unlink()
            continue
        lengths = [len(line) for line in _lines(path)]
        if sum(lengths) < path.stat().st_size:
            os.truncate(path, sum(lengths))
        if len(lengths) >= SHARD:
            _seal(path)


def _seal(path: Path) -> None:
    """Compress a full shard. At every moment the plain or the compressed one is whole."""
    temporary = _sealed(path).with_suffix(".gz.tmp")
    with path.open("rb") as plain, temporary.open("wb") as file:
        with gzip.GzipFile("", "wb", LEVEL, file, mtime=0) as packed:  # same records, same bytes
            shutil.copyfileobj(plain, packed, 1 << 20)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(_sealed(path))
    folder = os.open(path.parent, os.O_RDONLY)  # the new name reaches the disk before the old one leaves it
    os.fsync(folder)
    os.close(folder)
    path.unlink()


def _plain(folder: Path, kind: str, number: int) -> Path:
    return folder / f"{kind}-{number:05d}.jsonl"


def _sealed(path: Path) -> Path:
    return path.with_suffix(".jsonl.gz")


def _write(folder: Path, kind: str, lines: Iterator[bytes], settings: Mapping[str, Any], version: int = 0) -> None:
    """Write a store all at once, replacing an earlier one, the manifest last."""
    lock = _locked(folder)
    try:
        _clear(folder, kind)
        for number in count():
            path = _plain(folder, kind, number)
            if _durable(path, islice(lines, SHARD)) < SHARD:
                break
            _seal(path)
        _write_manifest(folder, kind, settings, version)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        lock.release()


def _write_manifest(folder: Path, kind: str, settings: Mapping[str, Any], version: int = 0) -> None:
    about = {"kind": kind, "format": FORMAT, "version": __version__, "commit": _commit(), "policy_version": version}
    temporary = folder / f"{MANIFEST}.tmp"
    _durable(temporary, [json.dumps({**about, "settings": settings}, indent=2).encode() + b"\n"])
    temporary.replace(folder / MANIFEST)


def _commit() -> str | None:
    """Commit of the source, if the package lies in a git checkout."""
    if not (PACKAGE.parent / ".git").exists():
        return None
    try:
        asked = ["git", "-C", str(PACKAGE.parent), "rev-parse", "HEAD"]
        return subprocess.run(asked, capture_output=True, text=True, check=True, timeout=10).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def _durable(path: Path, lines: Iterable[bytes]) -> int:
    """Write a file, all of it on the disk; returns how many lines."""
    with path.open("wb") as file:
        written = sum(1 for line in lines if file.write(line))
        file.flush()
        os.fsync(file.fileno())
    return written


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to the store {folder}: {error.strerror}; choose another --out")


def _line(name: str, record: Mapping[str, Any]) -> bytes:
    return json.dumps({"id": name, **record}, separators=(",", ":")).encode() + b"\n"


def _open(path: Path) -> IO[bytes]:
    if path.suffix == ".jsonl":
        with suppress(FileNotFoundError):  # sealed since it was listed
            return path.open("rb")
        path = _sealed(path)
    return cast(IO[bytes], gzip.open(path))


def _lines(path: Path) -> Iterator[bytes]:
    """Whole lines of a shard; a torn last one is passed over."""
    with _open(path) as file:
        try:
            yield from (line for line in file if line.endswith(b"\n"))
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise UserError(f"{path} is damaged ({error}); delete it and lose its records, or the store") from error


def _records(path: Path) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Whole lines of a shard, and the records that they hold."""
    for number, line in enumerate(_lines(path), 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number}: no JSON ({error}); delete the line or the store") from error
        if not isinstance(record, dict) or not isinstance(record.get("id"), str):
            raise UserError(f"{path}, line {number}: no record with an id; delete the line or the store")
        yield line, record


def _read(folder: str | Path, kind: str, parse: Callable[[Mapping[str, Any]], Record]) -> Iterator[Record]:
    manifest(folder, kind)
    for path in shards(folder, kind):
        for number, (_, record) in enumerate(_records(path), 1):
            try:
                yield parse({key: value for key, value in record.items() if key != "id"})
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(
                    f"{path}, line {number}: not one of {kind} ({reason}); delete the line or the store"
                ) from error
