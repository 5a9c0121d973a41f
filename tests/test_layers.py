"""Who may import whom: the sources are read, and the line that breaks a rule is named."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "rftt_lightning"

OURS = {  # room -> rooms that it may import, besides itself
    "core": set(),
    "answers": {"core"},
    "search": {"core", "answers"},
    "policy": {"core", "answers"},
    "training": {"core", "answers", "search", "policy"},
    "tiny": {"core", "policy"},
    "app": {"core", "answers", "search", "policy", "training"},
}
TORCH = {"torch", "torchmetrics", "transformers", "lightning", "pytorch_lightning", "tensorboard"}
OTHERS = {  # room -> packages that it may not import
    "core": TORCH,
    "answers": TORCH,
    "search": TORCH,
    "policy": {"lightning", "pytorch_lightning"},
}


def imports(source: str, package: tuple[str, ...]) -> Iterator[tuple[int, str]]:
    """Line and full name of everything that is imported, at any depth; ``package`` is the one that the file lies in."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            stem = ".".join((*base, *filter(None, [node.module])))
            yield from ((node.lineno, f"{stem}.{alias.name}") for alias in node.names)


def broken(source: str, path: str) -> list[str]:
    """What a file of the package breaks; ``path`` is relative to the package."""
    *folders, _ = Path(path).parts
    room = folders[0] if folders else ""
    found = []
    for line, name in imports(source, ("rftt_lightning", *folders)):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        ours = top == "rftt_lightning" and target in OURS
        if ours and room and target not in OURS[room] | {room}:
            found.append(f"{path}:{line}: {room} may not import {target} ({name})")
        if not ours and top in OTHERS.get(room, ()):
            found.append(f"{path}:{line}: {room} may not import {top} ({name})")
    return found


def test_every_room_has_a_rule():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and any(path.glob("*.py"))}
    assert rooms == set(OURS)


def test_rooms_import_only_what_they_may():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 20
    found = [line for file in files for line in broken(file.read_text("utf-8"), str(file.relative_to(PACKAGE)))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("source", "path", "message"),
    [
        ("import torch", "core/x.py", "core/x.py:1: core may not import torch (torch)"),
        ("\nfrom torch import nn", "search/x.py", "search/x.py:2: search may not import torch (torch.nn)"),
        ("def f():\n    import transformers", "answers/x.py", "answers/x.py:2: answers may not import transformers"),
        ("from lightning import Trainer", "policy/x.py", "policy may not import lightning"),
        ("from rftt_lightning.policy.hf import HFBackend", "search/x.py", "search may not import policy"),
        ("from rftt_lightning import policy", "search/x.py", "search may not import policy"),
        ("from ..policy import hf", "search/x.py", "search may not import policy"),
        ("from rftt_lightning.search import driver", "policy/x.py", "policy may not import search"),
        ("import rftt_lightning.tiny.countdown", "app/x.py", "app may not import tiny"),
        ("from rftt_lightning.answers import verify", "core/x.py", "core may not import answers"),
    ],
)
def test_a_broken_rule_is_seen(source, path, message):
    assert len(broken(source, path)) == 1
    assert message in broken(source, path)[0]


def test_what_is_allowed_passes():
    source = "import json\nfrom rftt_lightning.core import tree\nfrom rftt_lightning import __version__\nfrom . import driver"
    assert broken(source, "search/x.py") == []
    assert broken("import torch\nfrom lightning import Trainer", "training/x.py") == []
