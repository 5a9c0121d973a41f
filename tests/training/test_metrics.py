"""Answers are counted as a plain loop counts them, in one process and in two."""

import json
import pickle
import random
from collections.abc import Iterable
from math import sqrt
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch.multiprocessing import spawn

from rftt_lightning.core.contracts import Problem, Status, Verdict
from rftt_lightning.training.metrics import AnswerAccuracy

Answers = list[tuple[Status, str, str]]
LEVELS = ("1", "2", "Level 10", "")
SUBJECTS = ("Algebra", "数论\n[b]", "", "a" * 300)


def answers(
    count: int, seed: int = 0, levels: tuple[str, ...] = LEVELS, subjects: tuple[str, ...] = SUBJECTS
) -> Answers:
    draw = random.Random(seed)
    return [(draw.choice(list(Status)), draw.choice(levels), draw.choice(subjects)) for _ in range(count)]


def joined(parts: Iterable[Answers]) -> Answers:
    return [answer for part in parts for answer in part]


def counted(*parts: Answers) -> AnswerAccuracy:
    """A metric that was updated with each part."""
    metric = AnswerAccuracy()
    for part in parts:
        update(metric, part)
    return metric


def update(metric: AnswerAccuracy, part: Answers) -> None:
    problems = [Problem("p", "q", level=level, subject=subject) for _, level, subject in part]
    metric.update([Verdict(status) for status, _, _ in part], problems)


def account(found: list[Status]) -> dict:
    """By a loop, and Wilson's formula as it is written."""
    n, z = len(found), 1.959963984540054
    verdicts = {status.value: 0 for status in Status}
    for status in found:
        verdicts[status.value] += 1
    p = verdicts["right"] / n
    middle, half = p + z * z / (2 * n), z * sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    low, high = ((middle + sign * half) / (1 + z * z / n) for sign in (-1, 1))
    numbers = {"accuracy": p, "low": low, "high": high}
    return {**{k: pytest.approx(v, abs=1e-9) for k, v in numbers.items()}, "n": n, "verdicts": verdicts}


def oracle(given: Answers) -> dict:
    found = account([status for status, _, _ in given])
    for column, name in ((1, "by_level"), (2, "by_subject")):
        groups = {row[column] for row in given if row[column]}
        if groups:
            found[name] = {group: account([row[0] for row in given if row[column] == group]) for group in groups}
    return found


@pytest.mark.parametrize("count", [1, 2, 500])
def test_it_is_what_a_loop_counts(count):
    given = answers(count)
    found = counted(given).compute()
    assert found == oracle(given)
    assert json.loads(json.dumps(found)) == found
    assert all(list(found[name]) == sorted(found[name]) for name in ("by_level", "by_subject") if name in found)


def test_batches_add_up_and_a_reset_forgets():
    parts = [answers(7, 1), [], answers(20, 2), answers(1, 3)]
    metric = counted(*parts)
    assert metric.compute() == oracle(joined(parts))
    update(metric, parts[0])
    assert metric.compute() == oracle(joined([*parts, parts[0]]))  # not what was computed before
    metric.reset()
    update(metric, parts[2])
    assert metric.compute() == oracle(parts[2])


def test_a_call_gives_the_batch_and_counts_it():
    one, other = answers(9, 1), answers(5, 2)
    metric = counted(one)
    batch = metric([Verdict(s) for s, _, _ in other], [Problem("p", "q", level=a, subject=b) for _, a, b in other])
    assert batch == oracle(other) and metric.compute() == oracle(one + other)


def test_metrics_with_other_names_are_merged():
    one, other = answers(30, 1, ("1", "2")), answers(30, 2, ("2", "3"), ("Geometry",))
    metric = counted(one)
    metric.compute()
    metric.merge_state(counted(other))
    assert metric.compute() == oracle(one + other)
    metric.merge_state(AnswerAccuracy())
    assert metric.compute() == oracle(one + other)


@pytest.mark.parametrize("moved", [lambda m: m, lambda m: m.to("cpu"), lambda m: m.set_dtype(torch.bfloat16)])
def test_a_copy_and_a_pickle_go_on_where_it_was(moved):
    one, other = answers(30, 1), answers(30, 2)
    metric = moved(counted(one))
    for copy in (pickle.loads(pickle.dumps(metric)), metric.clone()):
        update(copy, other)
        assert copy.compute() == oracle(one + other)
    assert metric.compute() == oracle(one)


def test_without_levels_and_subjects_there_are_no_groups():
    found = counted(answers(5, levels=("",), subjects=("",))).compute()
    assert set(found) == {"accuracy", "low", "high", "n", "verdicts"}


@pytest.mark.filterwarnings("ignore:The ``compute`` method")
@pytest.mark.parametrize("parts", [(), ([],)])
def test_nothing_counted_is_no_accuracy(parts):
    with pytest.raises(ValueError):
        counted(*parts).compute()


def test_every_verdict_has_its_problem():
    with pytest.raises(ValueError):
        AnswerAccuracy().update([Verdict(Status.RIGHT)], [])


SHARES = {  # name -> what each of two ranks sees
    "other names": (answers(30, 1, ("1", "2")), answers(7, 2, ("2", "3"), ("Geometry",))),
    "one rank without answers": (answers(30, 1), []),
    "a rank that was never updated": (None, answers(9, 1)),
}


def count_in_a_process(rank: int, folder: Path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    found = {}
    for name, shares in SHARES.items():
        metric = AnswerAccuracy().to("cpu")
        if shares[rank] is not None:
            update(metric, shares[rank])
        metric.compute()
        found[name] = metric.compute()  # of all ranks, and only once
    (folder / f"{rank}.json").write_text(json.dumps(found))
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_count_what_one_does(tmp_path):
    spawn(count_in_a_process, (tmp_path,), nprocs=2)
    for rank in range(2):
        found = json.loads((tmp_path / f"{rank}.json").read_text())
        for name, shares in SHARES.items():
            assert found[name] == oracle(joined(share or [] for share in shares)), name
