"""The documentation is the test: every example of the conventions' table holds, and every rule that is given has its line."""

import re
from pathlib import Path

import pytest

import rftt_lightning.answers as package
from rftt_lightning.answers import verify
from rftt_lightning.core.contracts import Status

FOLDER = Path(package.__file__).parent
PAGE = (FOLDER / "README.md").read_text(encoding="utf-8")
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.partition("## Conventions")[2].splitlines()
    if line.startswith("| ") and "`" in line
]


def examples(column, sign):
    return [(row[0], *pair) for row in ROWS for pair in re.findall(rf"`([^`]+)` {sign} `([^`]+)`", row[column])]


EQUAL, DIFFERENT = examples(1, "="), examples(2, "≠")


def test_every_convention_has_examples_of_both():
    assert len(ROWS) >= 25
    for row in ROWS:
        assert len(row) == 3, row
        for column, found in ((1, EQUAL), (2, DIFFERENT)):
            assert sum(example[0] == row[0] for example in found) == row[column].count(";") + 1, row


@pytest.mark.parametrize(("convention", "gold", "answer"), EQUAL)
def test_equal(convention, gold, answer):
    assert verify(gold, answer).status is Status.RIGHT
    assert verify(gold, rf"So it is $\boxed{{{answer}}}$.").status is Status.RIGHT


@pytest.mark.parametrize(("convention", "gold", "answer"), DIFFERENT)
def test_different(convention, gold, answer):
    assert verify(gold, answer).status is Status.WRONG
    assert verify(gold, rf"So it is $\boxed{{{answer}}}$.").status is Status.WRONG


def test_every_rule_is_explained():
    source = "".join(path.read_text(encoding="utf-8") for path in FOLDER.glob("*.py"))
    given = set(re.findall(r'_by\(\s*"([a-z ]+)"', source)) | set(re.findall(r'TimedOut\("([a-z ]+)"', source))
    given |= set(re.findall(r'Status\.\w+, [^"\n]*, "([a-z ]+)"', source)) | set(
        re.findall(r'else "([a-z ]+)", rounded', source)
    )
    given |= {"sympy", "unproved", "unreadable answer"}
    table = PAGE.partition("| rule | decided by |")[2].partition("\n\n")[0]
    explained = {rule for rule in given if re.search(rf"\b{rule}\b", table)}
    assert len(given) > 20 and explained == given, given - explained
