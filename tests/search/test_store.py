"""A store keeps whole records, whatever happens to the process that writes it."""

import gzip
import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rftt_lightning import __version__
from rftt_lightning.core.contracts import (
    Problem,
    Provenance,
    Sampling,
    Score,
    Segment,
    Status,
    Step,
    Trajectory,
    UserError,
    Verdict,
)
from rftt_lightning.core.tree import Plan, Tree
from rftt_lightning.search.store import (
    FORMAT,
    MANIFEST,
    Store,
    describe,
    differences,
    digest,
    manifest,
    merge,
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
    assert [path.suffix for path in shards(tmp_path, "trees")] == [".gz", ".gz", ".jsonl"]


@given(st.data())
def test_any_tree_comes_back_equal_at_rest_or_not(data):
    """Planned, written, ended, held, backed up in any order; any numbers and texts."""
    number, text = st.floats(allow_nan=False), st.text(st.characters(), max_size=5)
    grown = Tree(Problem(data.draw(text), data.draw(text), data={"n": [1, None]}), (3, 2**31 - 1))
    for _ in range(data.draw(st.integers(0, 12))):
        node = data.draw(st.integers(0, len(grown) - 1))
        grown.plan(node, [Plan(data.draw(text), data.draw(number), data.draw(st.sampled_from(Provenance)))])
    for node in range(1, len(grown)):
        act = data.draw(st.integers(0, 15))
        if act & 1:
            logprobs = tuple(data.draw(st.lists(number, max_size=3)))
            row = tuple(range(len(logprobs))), logprobs, (2, 0, 1)[: len(logprobs)]
            priors = data.draw(st.dictionaries(text, number, max_size=2))
            grown.fill(
                node, Segment(grown.tag(node), *row, data.draw(text), data.draw(st.booleans()), priors, node % 3)
            )
        if act & 2:
            grown.end(node, data.draw(st.booleans()))
        if act & 4:
            grown.hold(node)
        if act & 8:
            verdict = Verdict(data.draw(st.sampled_from(Status)), data.draw(st.none() | text), forms=("1", "2"))
            value = data.draw(st.floats(0, 1))  # infinite ones of both signs would add up to NaN, which equals nothing
            grown.backup(node, Score(verdict, value, (0.5, data.draw(number)), (None, data.draw(number))))
    back = Tree.from_json(json.loads(json.dumps(grown.to_json())))
    assert back == grown and back.rollouts() == grown.rollouts()
    assert [type(plan.chosen) for plan in back.plans] == [type(plan.chosen) for plan in grown.plans]


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


@pytest.fixture
def small_shards(monkeypatch):
    monkeypatch.setattr("rftt_lightning.search.store.SHARD", 3)


def write(folder: Path, numbers, settings=None) -> Path:
    store = Store(folder, "trees", settings or {})
    for number in numbers:
        store.add(tree(number).problem.id, tree(number).to_json())
    store.close()
    return folder


def state(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl*")}


def test_a_full_shard_is_compressed_and_says_the_same(small_shards, tmp_path, monkeypatch):
    sealed = write(tmp_path / "sealed", range(7))
    assert sorted(state(sealed)) == ["trees-00000.jsonl.gz", "trees-00001.jsonl.gz", "trees-00002.jsonl"]
    monkeypatch.setattr("rftt_lightning.search.store.SHARD", 100)
    plain = write(tmp_path / "plain", range(7))
    assert list(state(plain)) == ["trees-00000.jsonl"]
    for about in (size, digest):
        assert about(sealed, "trees") == about(plain, "trees")
    assert list(read_trees(sealed)) == list(read_trees(plain)) == [tree(i) for i in range(7)]


@pytest.mark.parametrize("killed", ["before", "while compressing", "compressed", "renamed", "deleted"])
def test_killed_at_any_step_of_sealing_nothing_is_lost_or_doubled(small_shards, tmp_path, killed):
    straight = write(tmp_path / "straight", range(8))
    packed = (straight / "trees-00001.jsonl.gz").read_bytes()
    folder = write(tmp_path / "killed", range(6))
    (folder / "trees-00002.jsonl").unlink()  # a kill came before it was opened
    temporary, sealed, plain = (folder / f"trees-00001.jsonl{ending}" for ending in (".gz.tmp", ".gz", ""))
    sealed.unlink()
    if killed != "deleted":
        plain.write_bytes(gzip.decompress(packed))
    if killed in ("while compressing", "compressed"):
        temporary.write_bytes(packed[: len(packed) // 2] if killed == "while compressing" else packed)
    if killed in ("renamed", "deleted"):
        sealed.write_bytes(packed)
    before = state(folder)
    assert list(read_trees(folder)) == [tree(i) for i in range(6)]
    assert (size(folder, "trees"), len(shards(folder, "trees"))) == (6, 2)
    assert digest(folder, "trees") == digest(write(tmp_path / "six", range(6)), "trees")
    assert state(folder) == before, "reading never writes"
    assert state(write(folder, range(6, 8))) == state(straight)


def test_reading_goes_on_while_shards_are_sealed(small_shards, tmp_path):
    store = Store(tmp_path, "trees", {})
    for i in range(5):
        store.add(tree(i).problem.id, tree(i).to_json())
    begun = read_trees(tmp_path)
    assert next(begun) == tree(0)
    store.add(tree(5).problem.id, tree(5).to_json())  # seals what the reader has yet to open
    assert list(begun) == [tree(i) for i in range(1, 6)]
    store.close()


@pytest.mark.parametrize("step", ["write", "seal"])
def test_a_full_disk_is_one_line_and_loses_nothing(small_shards, tmp_path, monkeypatch, step):
    store = Store(tmp_path, "trees", {})
    for i in range(2):
        store.add(tree(i).problem.id, tree(i).to_json())
    with monkeypatch.context() as full:
        if step == "write":
            store._file.close()
            store._file = open("/dev/full", "ab")  # noqa: SIM115
        else:
            full.setattr("gzip.GzipFile", lambda *args, **settings: open("/dev/full", "wb"))  # noqa: SIM115
        with pytest.raises(UserError, match=r"cannot write to the store.*No space left"):
            store.add(tree(2).problem.id, tree(2).to_json())
        if step == "write":
            with pytest.raises(UserError, match="No space left"):
                store.close()
        else:
            store.close()
    left = list(Store(tmp_path, "trees", {}).done)
    assert left == [tree(i).problem.id for i in range(2 if step == "write" else 3)]


def test_a_damaged_compressed_shard_is_named(small_shards, tmp_path):
    write(tmp_path, range(4))
    path = shards(tmp_path, "trees")[0]
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], b"no gzip", whole[:20] + b"\xff" * 9 + whole[29:]):
        path.write_bytes(broken)
        for touch in (lambda: list(read_trees(tmp_path)), lambda: size(tmp_path, "trees")):
            with pytest.raises(UserError, match=re.escape(f"{path} is damaged")):
                touch()


def test_a_lost_shard_is_not_written_over(small_shards, tmp_path):
    write(tmp_path, range(8))
    shards(tmp_path, "trees")[1].unlink()
    write(tmp_path, (3, 8, 9))
    assert list(read_trees(tmp_path)) == [tree(i) for i in (0, 1, 2, 6, 7, 3, 8, 9)]


@pytest.mark.parametrize("known, said", [(FORMAT + 1, "update rftt_lightning"), (None, "make it anew"), ("x", "anew")])
def test_a_store_of_another_format_is_refused(tmp_path, known, said):
    write(tmp_path, range(2))
    about = json.loads((tmp_path / MANIFEST).read_text())
    assert about["format"] == FORMAT
    (tmp_path / MANIFEST).write_text(json.dumps({**about, "format": known}))
    for touch in (
        lambda: list(read_trees(tmp_path)),
        lambda: Store(tmp_path, "trees", {}),
        lambda: Store(tmp_path, "trees", {}, overwrite=True),
        lambda: merge(tmp_path / "out", [tmp_path]),
    ):
        with pytest.raises(UserError, match=f"format {known}, this version reads format {FORMAT}.*{said}") as error:
            touch()
        assert "\n" not in str(error.value)
    assert size(tmp_path, "trees") == 2


# -- merging -------------------------------------------------------------------------------------------------------------


@given(st.integers(0, 10**6), st.integers(1, 4))
def test_merged_ranks_are_the_straight_store(tmp_path_factory, seed, ranks):
    rng, root = random.Random(seed), tmp_path_factory.mktemp("merge")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rftt_lightning.search.store.SHARD", 3)
        cuts = sorted(rng.randrange(12) for _ in range(ranks - 1))
        parts = [range(a, b) for a, b in zip([0, *cuts], [*cuts, 11], strict=True)]
        shared = [rng.randrange(max(part.start, 1)) for part in parts]  # each store also has a tree of an earlier one
        stores = [
            write(root / str(rank), dict.fromkeys([*part, *([again] if part.start else [])]), {"seed": 1})
            for rank, (part, again) in enumerate(zip(parts, shared, strict=True))
        ]
        straight = write(root / "straight", range(11), {"seed": 1})
        assert merge(root / "out", stores) == 11
        assert state(root / "out") == state(straight)
        assert manifest(root / "out", "trees")["settings"] == manifest(straight, "trees")["settings"]
        assert list(Store(root / "out", "trees", {"seed": 1}).done) == [tree(i).problem.id for i in range(11)]


def test_what_cannot_be_merged_is_refused_before_anything_is_written(tmp_path):
    one = write(tmp_path / "one", range(3), {"seed": 1})
    other = write(tmp_path / "other", range(3, 5), {"seed": 2})
    write_trajectories(tmp_path / "paths", [trajectory(0)], {"seed": 1})
    clash = Store(tmp_path / "clash", "trees", {"seed": 1})
    clash.add(tree(1).problem.id, tree(2).to_json())
    clash.close()
    out = tmp_path / "out"
    for folders, said in (
        ([one, other], "other settings (seed: 1 there, 2 here)"),
        ([one, tmp_path / "paths"], "is a store of trajectories, not of trees"),
        ([one, tmp_path / "nowhere"], "is no store"),
        ([one, tmp_path / "clash"], f"{tree(1).problem.id!r}; leave one store out"),
    ):
        with pytest.raises(UserError, match=re.escape(said)):
            merge(out, folders)
        assert not out.exists()
    before = state(one)
    for target in (one, tmp_path / "paths" / ".." / "one"):
        with pytest.raises(UserError, match="cannot be written to"):
            merge(target, [one], overwrite=True)
    merge(out, [one])
    with pytest.raises(UserError, match="holds a store already"):
        merge(out, [other])
    assert state(out) == state(one) == before
    merge(out, [other], overwrite=True)
    assert list(read_trees(out)) == [tree(3), tree(4)]


def test_merged_trajectories_leave_out_which_trees_they_are_of(tmp_path):
    for name, numbers in (("a", (0, 0, 1)), ("b", (2, 1))):
        origin = {"folder": name, "digest": name, "settings": {"seed": 1}}
        write_trajectories(tmp_path / name, [trajectory(i) for i in numbers], {"trees": origin, "alpha": 0})
    assert merge(tmp_path / "out", [tmp_path / "a", tmp_path / "b"]) == 4
    assert list(read_trajectories(tmp_path / "out")) == [trajectory(i) for i in (0, 0, 1, 2)]
    assert manifest(tmp_path / "out", "trajectories")["settings"] == {"trees": {"settings": {"seed": 1}}, "alpha": 0}


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
