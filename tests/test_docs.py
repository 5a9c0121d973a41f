"""The commands in README and experiments are commands that exist, with options that exist."""

import re
import shlex
from pathlib import Path

import pytest

from rftt_lightning.app.cli import main

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "experiments").rglob("README.md"))]


def commands(page: Path, program: str = "rftt") -> list[str]:
    """Lines of the page's code blocks that begin with the program, with shell variables of the block filled in."""
    found = []
    for block in re.findall(r"^```\w*\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
        variables = dict(re.findall(r"^(\w+)=(\S+)$", block, re.M))
        for line in re.findall(rf"^{program} .*$", block, re.M):
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            found.append(line.split("#")[0].strip())
    return found


COMMANDS = sorted({command for page in PAGES for command in commands(page)})
SCRIPTS = sorted({command.split()[1] for page in PAGES for command in commands(page, "python")})


def test_there_are_commands():
    assert len(COMMANDS) >= 6


@pytest.mark.parametrize("command", COMMANDS)
def test_command_is_understood(command, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    args = shlex.split(command)[1:]
    with pytest.raises(SystemExit) as stop:
        main([*args, "--print_config"])
    assert stop.value.code in (0, None) and capsys.readouterr().out


@pytest.mark.parametrize("script", SCRIPTS)
def test_script_is_there(script):
    assert (ROOT / script).is_file()
