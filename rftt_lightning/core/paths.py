"""Paths in configs: ``pkg:tiny/prompts`` is a file that ships with the package, anything else is taken as it is."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent


def resolve(path: str | Path) -> str:
    """``pkg:`` paths become absolute; local paths and hub names come back unchanged."""
    text = str(path)
    return str(PACKAGE / text.removeprefix("pkg:")) if text.startswith("pkg:") else text
