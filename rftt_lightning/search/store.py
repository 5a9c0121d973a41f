"""Append-only stores of trees and trajectories: a folder with ``manifest.json`` and JSONL shards, one whole record a line.

A record counts once its line is complete, so a run that is killed loses at most the record being written, and a reader never
sees half a one. No pickle.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from rftt_lightning import __version__
from rftt_lightning.core.contracts import Trajectory, UserError
from rftt_lightning.core.tree import Tree

MANIFEST = "manifest.json"
SHARD = 1000
"""Records of a shard."""

Record = TypeVar("Record")


class Store:
    """An open store: ``store.add(problem_id, tree.to_json())`` appends, ``store.done`` holds the ids that are there.

    ``Store(folder, kind, settings)`` makes the folder, or opens it where an earlier run left off: then its manifest must
    have the same kind and settings, and a torn last line is cut off. Raises :class:`UserError` if they differ or the
    folder cannot be written.
    """

    def __init__(self, folder: str | Path, kind: str, settings: Mapping[str, Any], overwrite: bool = False) -> None:
        self.folder, self.kind = Path(folder), kind
        self.done: set[str] = set()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if overwrite:
                for old in (*self.folder.glob(f"{kind}-*.jsonl"), self.folder / MANIFEST):
                    old.unlink(missing_ok=True)
            self._open_manifest(json.loads(json.dumps(dict(settings))))
            for path in shards(self.folder, kind):
                self.done.update(record["id"] for record in _records(path, mend=True))
            self._file = self._shard().open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write to the store {self.folder}: {error.strerror}; choose another --out") from error

    def _open_manifest(self, settings: dict[str, Any]) -> None:
        path = self.folder / MANIFEST
        fresh = {"kind": self.kind, "settings": settings, "version": __version__}
        if not path.exists():
            temporary = path.with_suffix(".tmp")
            temporary.write_text(json.dumps(fresh, indent=2) + "\n", encoding="utf-8")
            temporary.replace(path)
            return
        known = manifest(self.folder, self.kind)["settings"]
        differing = sorted(key for key in {*known, *settings} if known.get(key) != settings.get(key))
        if differing:
            raise UserError(
                f"{self.folder} was begun with other settings ({', '.join(differing)} differ); give another --out, or "
                "--overwrite true to begin anew"
            )

    def _shard(self) -> Path:
        return self.folder / f"{self.kind}-{len(self.done) // SHARD:05d}.jsonl"

    def add(self, name: str, record: Mapping[str, Any]) -> None:
        """Append a record under a name that is not in the store yet."""
        if name in self.done:
            raise ValueError(f"{name} is in {self.folder} already")
        if len(self.done) % SHARD == 0:
            self._file.close()
            self._file = self._shard().open("a", encoding="utf-8")
        self._file.write(json.dumps({"id": name, **record}, separators=(",", ":")) + "\n")
        self._file.flush()
        self.done.add(name)

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def shards(folder: str | Path, kind: str) -> list[Path]:
    return sorted(Path(folder).glob(f"{kind}-*.jsonl"))


def manifest(folder: str | Path, kind: str) -> dict[str, Any]:
    """The manifest of a store of this kind; raises :class:`UserError` if the folder is none."""
    path = Path(folder) / MANIFEST
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{folder} is no store of {kind}: cannot read {path.name} ({error.strerror})") from error
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); delete the folder or give another") from error
    if data.get("kind") != kind:
        raise UserError(f"{folder} is a store of {data.get('kind')}, not of {kind}; give the folder that holds {kind}")
    return data


def _records(path: Path, mend: bool = False) -> Iterator[dict[str, Any]]:
    """Whole records of a shard; a torn last line is passed over, and cut off if ``mend``."""
    whole = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                yield json.loads(line)
            except ValueError as error:
                raise UserError(f"{path}, line {number}: no JSON record ({error}); delete the line or the store") from error
            whole += len(line)
    if mend and whole < path.stat().st_size:
        with path.open("r+b") as file:
            file.truncate(whole)


def _read(folder: str | Path, kind: str, parse: Callable[[Mapping[str, Any]], Record]) -> Iterator[Record]:
    manifest(folder, kind)
    for path in shards(folder, kind):
        for number, record in enumerate(_records(path), 1):
            try:
                record.pop("id")
                yield parse(record)
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"{path}, line {number}: not one of {kind} ({type(error).__name__}: {error})") from error


def read_trees(folder: str | Path) -> Iterator[Tree]:
    """All whole trees of a store, in the order in which they were finished."""
    return _read(folder, "trees", Tree.from_json)


def read_trajectories(folder: str | Path) -> Iterator[Trajectory]:
    """All whole trajectories of a store."""
    return _read(folder, "trajectories", Trajectory.from_json)


def write_trajectories(folder: str | Path, trajectories: Iterable[Trajectory], settings: Mapping[str, Any]) -> None:
    """Write a new store of trajectories, replacing an earlier one."""
    store = Store(folder, "trajectories", settings, overwrite=True)
    for number, trajectory in enumerate(trajectories):
        store.add(f"{trajectory.problem.id}#{number}", trajectory.to_json())
    store.close()
