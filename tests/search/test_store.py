"""A store keeps whole records, whatever happens to the process that writes it."""

import json
import re
from dataclasses import dataclass

import pytest

from rftt_lightning import __version__
from rftt_lightning.core.contracts import Problem, Sampling, Step, Trajectory, UserError
from rftt_lightning.core.tree import Tree
from rftt_lightning.search.store import (
    MANIFEST,
    Store,
    describe,
    differences,
    digest,
    manifest,
    read_trajectories,
    read_trees,
    shards,
    size,
    write_trajectories,
)


def trajectory(number: int) -> Trajectory:
    return Trajectory(
        Problem(str(number), f"what is {number}?"), (Step("output", str(number)),), (True,), "plain", {"n": [number]}
    )


def tree(number: int) -> Tree:
    return Tree(Problem(f"é{number}", f"what\n is {number}?", data={"n": [number]}), (number, 1))


def test_trajectories_come_back_equal_over_many_shards(tmp_path):
    made = [trajectory(i) for i in range(2500)]
    write_trajectories(tmp_path, made, {"seed": 1})
    assert list(read_trajectories(tmp_path)) == made
    assert len(shards(tmp_path, "trajectories")) == 3
    write_trajectories(tmp_path, made[:3], {"seed": 1})
    assert list(read_trajectories(tmp_path)) == made[:3] and len(shards(tmp_path, "trajectories")) == 1
    write_trajectories(tmp_path, [], {"seed": 1})
    assert list(read_trajectories(tmp_path)) == []


@pytest.mark.parametrize("ending", [999, 1000, 1001])
def test_trees_come_back_equal_over_many_shards_and_openings(tmp_path, ending):
    for begin, end in ((0, ending), (ending, 2100)):
        store = Store(tmp_path, "trees", {})
        assert list(store.done) == [f"é{i}" for i in range(begin)]
        for i in range(begin, end):
            store.add(tree(i).problem.id, tree(i).to_json())
        store.close()
    assert list(read_trees(tmp_path)) == [tree(i) for i in range(2100)]
    assert [size(tmp_path, "trees"), len(shards(tmp_path, "trees"))] == [2100, 3]


def test_wherever_a_write_is_cut_whole_records_are_left(tmp_path):
    """Records as they lie on the disk when the process is killed: all but the torn one are read, and it is written again."""
    made = [trajectory(i) for i in range(3)]
    store = Store(tmp_path, "trajectories", {"seed": 1})
    for i in range(3):
        store.add(str(i), made[i].to_json())
    with pytest.raises(UserError, match="another process is writing"):
        Store(tmp_path, "trajectories", {"seed": 1})
    path = shards(tmp_path, "trajectories")[0]
    store._lock.release()  # and no more: a kill closes nothing, but lets go of its locks
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for cut in sorted(
        {*range(0, len(whole), 23), *(end + d for end in ends for d in (-2, -1, 0, 1))} - {len(whole), len(whole) + 1}
    ):
        path.write_bytes(whole[:cut])
        known = whole[:cut].count(b"\n")
        assert list(read_trajectories(tmp_path)) == made[:known]
        assert path.read_bytes() == whole[:cut], "reading never writes"
        again = Store(tmp_path, "trajectories", {"seed": 1})
        assert list(again.done) == [str(i) for i in range(known)]
        for i in range(known, 3):
            again.add(str(i), made[i].to_json())
        again.close()
        assert path.read_bytes() == whole


def test_the_manifest_says_where_the_records_come_from(tmp_path):
    Store(tmp_path, "trees", {"seed": 1}, version=7).close()
    about = manifest(tmp_path, "trees")
    assert about["settings"] == {"seed": 1} and about["version"] == __version__ and about["policy_version"] == 7
    assert about["commit"] is None or re.fullmatch("[0-9a-f]{40}", about["commit"])
    Store(tmp_path, "trees", {"seed": 1}, version=8).close()  # neither commit nor version keeps a run from going on


def test_other_settings_are_refused_and_named(tmp_path):
    store = Store(tmp_path, "trees", {"seed": 1, "expander": {"c": 2.0, "rollouts": 8}})
    store.add("a", {})
    store.close()
    with pytest.raises(
        UserError, match=r"\(seed: 1 there, 2 here, expander\.c: 2\.0 there, 1\.0 here\).*--overwrite"
    ) as error:
        Store(tmp_path, "trees", {"seed": 2, "expander": {"c": 1.0, "rollouts": 8}})
    assert "\n" not in str(error.value)
    Store(tmp_path, "trees", {"seed": 2}, overwrite=True).close()


def test_an_empty_store_takes_the_settings_of_whoever_opens_it(tmp_path):
    Store(tmp_path, "trees", {"seed": 1}, version=3).close()
    shards(tmp_path, "trees")[0].write_text('{"id": "torn')
    store = Store(tmp_path, "trees", {"seed": 2}, version=4)
    about = manifest(tmp_path, "trees")
    assert (about["settings"], about["policy_version"]) == ({"seed": 2}, 4)
    store.add("a", {})
    store.close()
    with pytest.raises(UserError, match="seed: 2 there, 3 here"):
        Store(tmp_path, "trees", {"seed": 3})


def test_the_digest_is_of_what_the_records_hold(tmp_path):
    def made(folder, *records):
        store = Store(tmp_path / folder, "trees", {})
        for name, record in records:
            store.add(name, record)
        store.close()
        return digest(tmp_path / folder, "trees")

    one, other = ("a", {"n": 1}), ("a", {"n": 2})
    assert made("one", one) == made("same", one)
    assert len({made("1", one), made("2", other), made("3", one, ("b", {}))}) == 3


def test_differences_of_long_texts_are_named_too():
    assert differences({"a": "x" * 99 + "y"}, {"a": "x" * 99 + "z"}) == "a differs"
    assert differences({"a": 1}, {"b": {"c": 2}}) == 'a: 1 there, null here, b: null there, {"c": 2} here'


class Thing:
    def __init__(self, inner: object = None) -> None:
        self.inner, self.pattern, self._cache = inner, re.compile("a+"), object()


def test_settings_are_described_the_same_in_every_process():
    @dataclass(frozen=True)
    class Record:
        names: tuple[str, ...] = ("a", "b")

    described = describe({"thing": Thing([Thing(), Record()]), "sampling": Sampling()})
    assert described == json.loads(json.dumps(described))
    assert "0x" not in json.dumps(described) and "_cache" not in json.dumps(described)
    assert described["thing"]["inner"][0] == {"class": "Thing", "inner": None, "pattern": "a+"}
    assert described["thing"]["inner"][1]["names"] == ["a", "b"] and described["sampling"]["top_p"] == 1.0
    round_and_round = Thing()
    round_and_round.inner = round_and_round
    assert json.dumps(describe(round_and_round))


def test_a_name_is_stored_once(tmp_path):
    store = Store(tmp_path, "trees", {})
    store.add("a", {})
    with pytest.raises(ValueError, match="already"):
        store.add("a", {})


@pytest.mark.parametrize("line", ["{broken", "[]", '"text"', "{}", '{"id": 3}', "\x00"])
def test_damage_is_named_by_file_and_line(tmp_path, line):
    write_trajectories(tmp_path, [trajectory(0), trajectory(1)], {})
    path = shards(tmp_path, "trajectories")[0]
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], line, lines[1]]) + "\n")
    for read in (lambda: list(read_trajectories(tmp_path)), lambda: Store(tmp_path, "trajectories", {})):
        with pytest.raises(UserError, match=re.escape(f"{path}, line 2: ")) as error:
            read()
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("field", ["problem", "steps", "train", "kind"])
def test_a_record_of_something_else_is_named_by_file_and_line(tmp_path, field):
    write_trajectories(tmp_path, [trajectory(0)], {})
    path = shards(tmp_path, "trajectories")[0]
    record = {"id": "x", **trajectory(0).to_json()}
    del record[field]
    broken = [record] if field == "kind" else [record, *({**record, field: value} for value in (None, 3))]
    for each in broken:
        path.write_text(json.dumps(each) + "\n")
        with pytest.raises(UserError, match=re.escape(f"{path}, line 1: not one of trajectories")):
            list(read_trajectories(tmp_path))


def test_what_is_no_store_is_refused(tmp_path):
    with pytest.raises(UserError, match="no store"):
        list(read_trajectories(tmp_path / "nowhere"))
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        Store(tmp_path / "file" / "below", "trees", {})
    with pytest.raises(UserError, match="cannot write"):
        write_trajectories(tmp_path / "file" / "below", [], {})
    for text in ("{", "[]", "{}", '{"kind": "trees"}'):
        (tmp_path / MANIFEST).write_text(text)
        with pytest.raises(UserError, match="is damaged"):
            list(read_trees(tmp_path))


def test_a_store_of_another_kind_is_neither_read_nor_overwritten(tmp_path):
    store = Store(tmp_path, "trees", {})
    store.add("a", {})
    store.close()
    for touch in (
        lambda: list(read_trajectories(tmp_path)),
        lambda: write_trajectories(tmp_path, [trajectory(0)], {}),
        lambda: Store(tmp_path, "trajectories", {}, overwrite=True),
    ):
        with pytest.raises(UserError, match="is a store of trees, not of trajectories"):
            touch()
    assert list(Store(tmp_path, "trees", {}).done) == ["a"]


def test_records_whose_manifest_is_lost_are_not_taken_over(tmp_path):
    store = Store(tmp_path, "trees", {"seed": 1})
    store.add("a", {})
    store.close()
    (tmp_path / MANIFEST).unlink()
    with pytest.raises(UserError, match="no manifest"):
        Store(tmp_path, "trees", {"seed": 2})
    assert not Store(tmp_path, "trees", {"seed": 2}, overwrite=True).done


def test_one_process_at_a_time_writes_trajectories(tmp_path):
    write_trajectories(tmp_path, [trajectory(0)], {})
    store = Store(tmp_path, "trajectories", {})
    with pytest.raises(UserError, match="another process is writing"):
        write_trajectories(tmp_path, [trajectory(1)], {})
    assert list(read_trajectories(tmp_path)) == [trajectory(0)]
    store.close()
    for number in (1, 2):
        write_trajectories(tmp_path, [trajectory(number)], {})
    assert list(read_trajectories(tmp_path)) == [trajectory(2)]


def test_trajectories_whose_writing_broke_off_are_no_store(tmp_path):
    write_trajectories(tmp_path, [trajectory(i) for i in range(3)], {})

    def breaking_off():
        yield trajectory(0)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_trajectories(tmp_path, breaking_off(), {})
    with pytest.raises(UserError, match="no store"):
        list(read_trajectories(tmp_path))
    write_trajectories(tmp_path, [trajectory(1)], {})
    assert list(read_trajectories(tmp_path)) == [trajectory(1)]
