"""Stores of trees and trajectories: a folder with ``manifest.json`` and JSONL shards, one whole record a line. No pickle.

Trees are appended one by one (:class:`Store`). A record counts once its line is complete, so a run that is killed loses at
most the record being written, and a reader never sees half a one. Trajectories are written all at once
(:func:`write_trajectories`), the manifest last, so a store of them is whole or it is none.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeVar

from filelock import FileLock, Timeout

from rftt_lightning import __version__
from rftt_lightning.core.contracts import Trajectory, UserError
from rftt_lightning.core.paths import PACKAGE
from rftt_lightning.core.tree import Tree

MANIFEST = "manifest.json"
LOCK = "writing.lock"
SHARD = 1000
"""Records of a shard."""

Record = TypeVar("Record")


class Store:
    """An open store: ``store.add(tree.problem.id, tree.to_json())`` appends a record.

    ``Store(folder, kind, settings)`` makes the folder, or opens it where an earlier run left off: then its manifest
    must have the same kind and, if there is any record, the same settings, and a torn last line is cut off. ``done``
    maps the ids that are there to their problems (None in a record without one). ``version`` counts the policy
    updates before the run; like the source commit it is noted in the manifest and not compared. Raises
    :class:`UserError` if settings differ, naming them, if the folder holds another kind of store (which ``overwrite``
    does not touch either), if another process is writing it, or if it cannot be written.
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
            for path in shards(self.folder, kind):
                self.done.update((record["id"], record.get("problem")) for record in _records(path, mend=True))
            self._file = self._shard().open("a", encoding="utf-8")
        except OSError as error:
            self._lock.release()
            raise _unwritable(self.folder, error) from error
        except UserError:
            self._lock.release()
            raise

    def _open_manifest(self, settings: dict[str, Any], version: int) -> None:
        known = manifest(self.folder, self.kind)["settings"] if (self.folder / MANIFEST).exists() else None
        if not size(self.folder, self.kind):  # a run that came to nothing binds none that follows
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

    def _shard(self) -> Path:
        return self.folder / f"{self.kind}-{len(self.done) // SHARD:05d}.jsonl"

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a record under a name that is not in the store yet. Raises :class:`UserError` if the disk does not take it."""
        if name in self.done:
            raise ValueError(f"{name} is in {self.folder} already")
        try:
            if len(self.done) % SHARD == 0:
                self._finish()
                self._file = self._shard().open("a", encoding="utf-8")
            self._file.write(_line(name, record))
            self._file.flush()
        except OSError as error:
            raise _unwritable(self.folder, error) from error
        self.done[name] = record.get("problem")

    def close(self) -> None:
        """Make sure that all records are on the disk, and let others write."""
        self._finish()
        self._lock.release()

    def _finish(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


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
    return sorted(Path(folder).glob(f"{kind}-*.jsonl"))


def size(folder: str | Path, kind: str) -> int:
    """How many whole records a store has."""
    return sum(path.read_bytes().count(b"\n") for path in shards(folder, kind))


def digest(folder: str | Path, kind: str) -> str:
    """Hexadecimal digest of all that a store's shards hold: another one when a record is added, lost or replaced."""
    content = hashlib.blake2b(digest_size=16)
    for path in shards(folder, kind):
        content.update(path.read_bytes())
    return content.hexdigest()


def manifest(folder: str | Path, kind: str) -> dict[str, Any]:
    """The manifest of a store of this kind; raises :class:`UserError` if the folder is none."""
    path = Path(folder) / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} is no store of {kind}: cannot read {path.name} ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete the folder or give another") from error
    if not isinstance(data, dict) or not isinstance(data.get("settings"), dict):
        raise UserError(f"{path} is damaged (no settings); delete the folder or give another")
    if data.get("kind") != kind:
        raise UserError(f"{folder} is a store of {data.get('kind')}, not of {kind}; give a folder of {kind}")
    return data


def read_trees(folder: str | Path) -> Iterator[Tree]:
    """All whole trees of a store, in the order in which they were finished."""
    return _read(folder, "trees", Tree.from_json)


def read_trajectories(folder: str | Path) -> Iterator[Trajectory]:
    """All trajectories of a store."""
    return _read(folder, "trajectories", Trajectory.from_json)


def write_trajectories(folder: str | Path, trajectories: Iterable[Trajectory], settings: Mapping[str, Any]) -> None:
    """Write a store of trajectories, replacing an earlier one; if it is killed meanwhile, the folder is no store. Raises
    :class:`UserError` as :class:`Store` does."""
    folder, kind = Path(folder), "trajectories"
    lock = _locked(folder)
    lines = (_line(f"{t.problem.id}#{number}", t.to_json()) for number, t in enumerate(trajectories))
    try:
        _clear(folder, kind)
        for shard in count(0):
            if not (text := "".join(islice(lines, SHARD))):
                break
            _durable(folder / f"{kind}-{shard:05d}.jsonl", text)
        _write_manifest(folder, kind, settings)
    except OSError as error:
        raise _unwritable(folder, error) from error
    finally:
        lock.release()


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
    for old in shards(folder, kind):
        old.unlink()


def _write_manifest(folder: Path, kind: str, settings: Mapping[str, Any], version: int = 0) -> None:
    about = {"kind": kind, "version": __version__, "commit": _commit(), "policy_version": version, "settings": settings}
    temporary = folder / f"{MANIFEST}.tmp"
    _durable(temporary, json.dumps(about, indent=2) + "\n")
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


def _durable(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _unwritable(folder: Path, error: OSError) -> UserError:
    return UserError(f"cannot write to the store {folder}: {error.strerror}; choose another --out")


def _line(name: str, record: Mapping[str, Any]) -> str:
    return json.dumps({"id": name, **record}, separators=(",", ":")) + "\n"


def _records(path: Path, mend: bool = False) -> Iterator[dict[str, Any]]:
    """Whole records of a shard; a torn last line is passed over, and cut off if ``mend``."""
    whole = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                record = json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no JSON ({error}); delete the line or the store") from error
            if not isinstance(record, dict) or not isinstance(record.get("id"), str):
                raise UserError(f"{path}, line {number}: no record with an id; delete the line or the store")
            yield record
            whole += len(line)
    if mend and whole < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(whole)


def _read(folder: str | Path, kind: str, parse: Callable[[Mapping[str, Any]], Record]) -> Iterator[Record]:
    manifest(folder, kind)
    for path in shards(folder, kind):
        for number, record in enumerate(_records(path), 1):
            try:
                yield parse({key: value for key, value in record.items() if key != "id"})
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                reason = f"{type(error).__name__}: {error}"
                raise UserError(
                    f"{path}, line {number}: not one of {kind} ({reason}); delete the line or the store"
                ) from error
