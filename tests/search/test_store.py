"""A store keeps whole records, whatever happens to the process that writes it."""

import json

import pytest

from rftt_lightning.core.contracts import Problem, Step, Trajectory, UserError
from rftt_lightning.search.store import Store, read_trajectories, shards, write_trajectories


def trajectory(number: int) -> Trajectory:
    return Trajectory(Problem(str(number), f"what is {number}?"), (Step("output", str(number)),), (True,), "plain", {"n": [number]})


def test_trajectories_come_back_equal_over_many_shards(tmp_path):
    made = [trajectory(i) for i in range(2500)]
    write_trajectories(tmp_path, made, {"seed": 1})
    assert list(read_trajectories(tmp_path)) == made
    assert len(shards(tmp_path, "trajectories")) == 3


@pytest.mark.parametrize("cut", [1, 7, 40])
def test_a_torn_last_line_is_dropped_and_written_again(tmp_path, cut):
    store = Store(tmp_path, "trajectories", {"seed": 1})
    for i in range(5):
        store.add(str(i), trajectory(i).to_json())
    path = shards(tmp_path, "trajectories")[0]
    path.write_bytes(path.read_bytes()[:-cut])
    assert len(list(read_trajectories(tmp_path))) == 4
    again = Store(tmp_path, "trajectories", {"seed": 1})
    assert list(again.done) == ["0", "1", "2", "3"]
    again.add("4", trajectory(4).to_json())
    assert list(read_trajectories(tmp_path)) == [trajectory(i) for i in range(5)]


def test_other_settings_are_refused_and_named(tmp_path):
    Store(tmp_path, "trees", {"seed": 1, "reward": "a"}).close()
    with pytest.raises(UserError, match="seed"):
        Store(tmp_path, "trees", {"seed": 2, "reward": "a"})
    Store(tmp_path, "trees", {"seed": 2, "reward": "a"}, overwrite=True).close()


def test_a_name_is_stored_once(tmp_path):
    store = Store(tmp_path, "trees", {})
    store.add("a", {})
    with pytest.raises(ValueError, match="already"):
        store.add("a", {})


def test_damage_is_named_by_file_and_line(tmp_path):
    write_trajectories(tmp_path, [trajectory(0), trajectory(1)], {})
    path = shards(tmp_path, "trajectories")[0]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{broken", lines[1]]) + "\n")
    with pytest.raises(UserError, match="line 2"):
        list(read_trajectories(tmp_path))
    path.write_text(json.dumps({"id": "x"}) + "\n")
    with pytest.raises(UserError, match="line 1"):
        list(read_trajectories(tmp_path))


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="no store"):
        list(read_trajectories(tmp_path / "nowhere"))
    Store(tmp_path, "trees", {}).close()
    with pytest.raises(UserError, match="store of trees"):
        list(read_trajectories(tmp_path))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Store(tmp_path / "file" / "below", "trees", {})
