"""Trees stored step by step, by several processes: what a killed run finds again, and what readers see."""

import gzip
from pathlib import Path

import pytest

from rftt_lightning.core.contracts import Problem, UserError
from rftt_lightning.core.tree import Tree
from rftt_lightning.search.store import LOCK, StepStore, manifest, read_trees, write_trajectories


def tree(number: int, text: str = "") -> Tree:
    return Tree(Problem(str(number), f"what is {number}?{text}"), (number, 1))


def store(folder: Path, process: int = 0, settings: dict | None = None, steps: int = 9, **more) -> StepStore:
    made = StepStore(folder, process)
    made.prepare(settings or {"seed": 0}, steps, **more)
    return made


def grow(into: StepStore, step: int, numbers: list[int], policy: str = "p", close: bool = True) -> None:
    into.read_step(step, policy)
    into.open_step(step, policy)
    for number in numbers:
        into.add(tree(number))
    if close:
        into.close_step([tree(number) for number in sorted(numbers)])


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("trees-*")}


def test_a_step_has_the_same_bytes_in_whatever_order_its_trees_were_finished(tmp_path):
    grow(store(tmp_path / "one"), 3, [2, 0, 1])
    grow(store(tmp_path / "other"), 3, [1, 2, 0])
    assert files(tmp_path / "one") == files(tmp_path / "other")
    assert list(files(tmp_path / "one")) == ["trees-000003-000.jsonl.gz"]
    assert list(read_trees(tmp_path / "one")) == [tree(0), tree(1), tree(2)]
    assert manifest(tmp_path / "one", "trees")["settings"] == {"seed": 0}


def test_trees_are_on_the_disk_when_they_are_added(tmp_path):
    grow(store(tmp_path), 0, [1, 0], close=False)
    assert list(read_trees(tmp_path)) == [tree(1), tree(0)]
    assert store(tmp_path).read_step(0, "p") == {"1": tree(1), "0": tree(0)}


@pytest.mark.parametrize("torn", [b"", b'{"id": "0/9", "st'])
def test_a_killed_step_goes_on_with_its_whole_trees(tmp_path, torn):
    grow(store(tmp_path), 0, [1], close=False)
    with (tmp_path / "trees-000000-000.jsonl").open("ab") as file:
        file.write(torn)
    grow(store(tmp_path), 0, [2], close=False)
    assert list(read_trees(tmp_path)) == [tree(1), tree(2)]


def test_only_trees_of_the_step_and_the_policy_are_found_and_others_of_the_step_give_way(tmp_path):
    made = store(tmp_path)
    for step, policy in enumerate("pq"):
        grow(made, step, [step, 7], policy)
    assert made.read_step(0, "q") == made.read_step(2, "p") == {} != made.read_step(1, "q")
    grow(made, 1, [8], "r", close=False)
    assert list(read_trees(tmp_path)) == [tree(0), tree(7), tree(8)]
    assert not list(tmp_path.glob("trees-000001-*.gz"))


def test_processes_write_beside_each_other_and_find_each_others_trees(tmp_path):
    """Also where there are fewer of them after a kill; what those left that are no more goes when the step is whole."""
    first, second = store(tmp_path), StepStore(tmp_path, 1)
    grow(first, 0, [0, 2], close=False)
    grow(second, 0, [1], close=False)
    alone = store(tmp_path)
    assert set(alone.read_step(0, "p")) == {"0", "1", "2"}
    alone.open_step(0, "p")
    assert sorted(found.problem.id for found in read_trees(tmp_path)) == ["0", "1", "2"]
    alone.close_step([tree(0), tree(1), tree(2)])
    alone.tidy_step(1)
    assert list(read_trees(tmp_path)) == [tree(0), tree(1), tree(2)]
    assert list(files(tmp_path)) == ["trees-000000-000.jsonl.gz"]


def test_tidying_leaves_the_other_processes_alone(tmp_path):
    pair = store(tmp_path), StepStore(tmp_path, 1)
    for process, made in enumerate(pair):
        grow(made, 0, [process])
    pair[0].tidy_step(2)
    assert list(read_trees(tmp_path)) == [tree(0), tree(1)]


@pytest.mark.parametrize(
    "more, left",
    [
        ({}, [0, 1]),
        ({"steps": 1}, [0]),
        ({"steps": 0}, []),
        ({"settings": {"seed": 1}}, []),
        ({"settings": {"seed": 1}, "done": 1}, [0]),
        ({"done": 1}, [0, 1]),
        ({"steps": 1, "done": 2}, [0, 1]),
        ({"steps": 0, "done": 1}, [0]),
    ],
)
def test_what_is_not_of_this_run_goes(tmp_path, more, left):
    made = store(tmp_path)
    for step in (0, 1):
        grow(made, step, [step])
    (tmp_path / "trees-000000-000.tmp").write_text("left by a kill")
    store(tmp_path, **more)
    assert list(read_trees(tmp_path)) == [tree(number) for number in left]
    assert not list(tmp_path.glob("*.tmp")) and not (tmp_path / LOCK).exists()


def test_where_a_kill_left_both_the_sealed_shard_counts(tmp_path):
    grow(store(tmp_path), 0, [0, 1])
    (tmp_path / "trees-000000-000.jsonl").write_bytes(gzip.decompress(files(tmp_path).popitem()[1])[:-9])
    assert set(store(tmp_path).read_step(0, "p")) == {"0", "1"}


def test_another_kind_of_store_is_refused(tmp_path):
    write_trajectories(tmp_path, [], {})
    with pytest.raises(UserError, match="is a store of trajectories"):
        store(tmp_path)
