"""``rftt store``: what is listed, exported and merged is what a plain loop over the records finds; mistakes are one line."""

import json
import random
import subprocess
import sys
import weakref
from dataclasses import replace
from fnmatch import fnmatchcase
from itertools import product
from pathlib import Path

import pytest

from rftt_lightning.app import cli
from rftt_lightning.app import store as command
from rftt_lightning.core.contracts import Completion, Problem, Segment, Step, Trajectory
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.search.curate import Curator, Report
from rftt_lightning.search.driver import grow
from rftt_lightning.search.expand import PromptExpander, TokenExpander
from rftt_lightning.search.store import Store, read_trajectories, read_trees, write_trajectories
from scripted import ScriptedBackend, ScriptedReward, ScriptedSource

TABLE = TokenTable.from_yaml()
COUNT = 12


@pytest.fixture(scope="module")
def grown():
    """Trees with functional tokens, the second half by a policy that was updated."""
    found = []
    for version in (0, 1):
        source = ScriptedSource(COUNT)
        source.list = source.list[version * COUNT // 2 : (version + 1) * COUNT // 2]
        expander = TokenExpander(rollouts=8)
        backend = ScriptedBackend(TABLE, stop=0.4, version=version)
        found += [tree for _, tree in grow(source.problems(), expander, backend, ScriptedReward(TABLE), source)]
    return found


def write(folder, trees, settings=None) -> str:
    store = Store(folder, "trees", settings or {"seed": 0})
    for tree in trees:
        store.add(tree.problem.id, tree.to_json())
    store.close()
    return str(folder)


@pytest.fixture
def folder(tmp_path, grown):
    return write(tmp_path / "trees", grown)


def paths(count=6) -> list[Trajectory]:
    first = Trajectory(
        Problem("é/0", "what ?"), (Step("output", "\ud83d <verify>"),), (True,), "plain", {"correct": [1]}
    )
    steps = (Step("next_step", "1"), Step("verify", "no"), Step("refine", "2"), Step("output", "2"))
    merged = Trajectory(Problem("é/0", "what ?"), steps, (False, True, True, True), "merged", {"wrong": [2]})
    made = [first, merged]
    return made + [replace(made[n % 2], problem=Problem(f"w/{n // 2}", "what ?")) for n in range(count - 2)]


def store(*args: object) -> int:
    return cli.main(["store", *map(str, args)])


def lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


CHOICES = {
    "--problem": (None, "scripted/1*", "scripted/[!3]"),
    "--verdict": (None, "right", "no_answer"),
    "--uses": (None, "verify", "verify refine"),
    "--lacks": (None, "analyze"),
    "--min_version": (None, 1),
    "--max_version": (None, 0),
}


def meant(rollout, problem, verdict, uses, lacks, least, most) -> bool:
    """The filters' meaning, slowly."""
    tags = [step.tag for step in rollout.steps]
    versions = [segment.version for segment in rollout.segments]
    return (
        (problem is None or fnmatchcase(rollout.problem.id, problem))
        and (verdict is None or rollout.score.verdict.status.value == verdict)
        and all(tag in tags for tag in (uses or "").split())
        and not any(tag in tags for tag in (lacks or "").split())
        and (least is None or all(version >= least for version in versions))
        and (most is None or all(version <= most for version in versions))
    )


def test_export_and_list_are_a_plain_loop_for_all_filters(folder, grown, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    out, sizes = tmp_path / "sub" / "out.jsonl", set()
    for choice in random.Random(0).sample(list(product(*CHOICES.values())), 40):
        filters = [
            [name, *str(value).split()] for name, value in zip(CHOICES, choice, strict=True) if value is not None
        ]
        args = [word for words in filters for word in words]
        wanted = [(tree, rollout) for tree in grown for rollout in tree.rollouts() if meant(rollout, *choice)]
        sizes.add(len(wanted))
        assert store("export", folder, "--out", out, *args) == 0
        assert [(line["lineage"]["tree"], tuple(line["lineage"]["nodes"])) for line in lines(out)] == [
            (tree.problem.id, rollout.nodes) for tree, rollout in wanted
        ]
        if choice[4] is None:
            capsys.readouterr()
            assert store("list", folder, *args) == 0
            total = capsys.readouterr().out.splitlines()[-2].replace("│", " ").split()
            trees = {tree.problem.id: tree for tree, _ in wanted}.values()
            nodes = sum(segment is not None for tree in trees for segment in tree.segments)
            assert total[:2] == ["all", str(len(trees))] and (not trees or total[2] == str(nodes))
            assert not trees or total[4] == str(len(wanted))
    assert len(sizes) > 12, "the filters differ"


def test_an_exported_rollout_is_whole(folder, grown, tmp_path):
    store("export", folder, "--out", tmp_path / "out.jsonl")
    rollouts = {(tree.problem.id, r.nodes): (tree, r) for tree in grown for r in tree.rollouts()}
    exported = lines(tmp_path / "out.jsonl")
    assert len(exported) == len(rollouts)
    for line in exported:
        tree, rollout = rollouts[line["lineage"]["tree"], tuple(line["lineage"]["nodes"])]
        assert line["problem"]["question"] == rollout.problem.question
        assert [Step(**step) for step in line["steps"]] == [tree.segments[n].step for n in rollout.nodes]
        assert line["verdict"] == rollout.score.verdict.status and line["answer"] == rollout.score.verdict.answer
        assert (line["value"], tuple(line["rewards"])) == (rollout.score.value, rollout.score.rewards)
        assert (line["tokens"], line["complete"]) == (rollout.length, rollout.complete)
        assert line["versions"] == sorted({segment.version for segment in rollout.segments})


def test_list_shows_so_many_rows_and_all_totals(folder, grown, capsys):
    assert store("list", folder, "--limit", 2) == 0
    said = capsys.readouterr().out
    assert said.count("scripted/") == 2 and "2 of 12 problems shown" in said and "all 12" in said
    rights = sum(r.score.verdict.right for tree in grown for r in tree.rollouts())
    assert str(rights) in said.splitlines()[-3]
    store("list", folder, "--limit", 99)
    assert capsys.readouterr().out.count("scripted/") == 12


def test_show_prints_the_tree(folder, grown, capsys):
    assert store("show", folder, "--problem", "scripted/7") == 0
    assert capsys.readouterr().out == next(t for t in grown if t.problem.id == "scripted/7").render() + "\n"


def test_stores_of_ranks_are_merged(folder, grown, tmp_path, capsys):
    ranks = [write(tmp_path / str(rank), grown[rank::3]) for rank in range(3)]
    assert store("merge", tmp_path / "out", *ranks, ranks[1]) == 0
    assert "12 trees" in capsys.readouterr().out
    merged, straight = ({t.problem.id: t for t in read_trees(f)} for f in (tmp_path / "out", folder))
    assert merged == straight
    assert store("merge", tmp_path / "out", *ranks, "--overwrite", "true") == 0


def test_trajectories_are_listed_exported_and_merged(tmp_path, capsys):
    made, out = paths(), tmp_path / "out.jsonl"
    write_trajectories(tmp_path / "all", made, {})
    assert store("list", tmp_path / "all") == 0
    total = capsys.readouterr().out.splitlines()[-2].replace("│", " ").split()
    assert total == ["all", "3", "6", "3", "15", "12"]
    for args, wanted in (
        ([], made),
        (["--kind", "merged"], made[1::2]),
        (["--lacks", "refine", "--problem", "w/*"], made[2::2]),
        (["--uses", "verify", "output"], made[1::2]),
    ):
        assert store("export", tmp_path / "all", "--out", out, *args) == 0
        found = [
            Trajectory(
                Problem(**line["problem"]),
                tuple(Step(step["tag"], step["text"]) for step in line["steps"]),
                tuple(step["train"] for step in line["steps"]),
                line["kind"],
                {key: value for key, value in line["lineage"].items() if key != "tree"},
            )
            for line in lines(out)
        ]
        assert found == wanted and all(line["lineage"]["tree"] == line["problem"]["id"] for line in lines(out))
    for name, part in (("a", made[:2]), ("b", made[2:])):
        write_trajectories(tmp_path / name, part, {})
    assert store("merge", tmp_path / "merged", tmp_path / "a", tmp_path / "b") == 0
    assert list(read_trajectories(tmp_path / "merged")) == made


class Denies(ScriptedBackend):
    def generate(self, requests):
        said = Segment("verify", (1,), (0.0,), (0,), "Verdict: wrong", True)
        return [Completion((said,)) for _ in requests]


def test_a_trajectory_names_the_nodes_that_its_steps_are_from(tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name in TABLE.names:
        (prompts / f"{name}.txt").write_text(name)
    source = ScriptedSource(40)
    expander = PromptExpander(prompts=str(prompts), rollouts=8)
    found = [
        t for _, t in grow(source.problems(), expander, ScriptedBackend(TABLE, stop=0.4), ScriptedReward(TABLE), source)
    ]
    folder, kinds = write(tmp_path / "trees", found), set()
    curated = Curator(alpha=0.0).curate(read_trees(folder), source, Denies(TABLE), Report())
    write_trajectories(tmp_path / "paths", curated, {})
    trees = {tree.problem.id: tree for tree in read_trees(folder)}
    for path in read_trajectories(tmp_path / "paths"):
        tree = trees[path.problem.id]
        right, *wrongs = (
            [tree.segments[n].step for n in nodes] for nodes in (path.lineage["correct"], *path.lineage["wrong"])
        )
        (wrong,) = wrongs or [[]]
        kinds.add(path.kind)
        if path.kind == "plain":
            assert list(path.steps[:-1]) == right and not wrong
            continue
        assert list(path.steps[: len(wrong)]) == wrong
        refine = path.steps[len(wrong) + 1]
        onward = path.steps[len(wrong) + 2 : -1]
        assert refine.tag == "refine" and refine.text == right[-len(onward) - 1].text
        assert right[len(right) - len(onward) :] == list(onward)
    assert kinds == {"plain", "merged"}


def test_a_tag_of_the_grammar_may_be_asked_for_where_no_path_has_it(tmp_path, capsys):
    settings = {"grammar": {"question": ["output"], "hint": ["output"], "output": []}}
    for name, of in (("one", settings), ("other", {"trees": {"settings": settings}})):
        write_trajectories(tmp_path / name, paths(), of)
        assert store("export", tmp_path / name, "--out", tmp_path / "out.jsonl", "--lacks", "hint") == 0
        assert "6 trajectories" in capsys.readouterr().out
        assert store("list", tmp_path / name, "--uses", "hint") == 0
        assert store("list", tmp_path / name, "--uses", "hnt") == 2


@pytest.mark.parametrize("verb", ["list", "export"])
def test_trees_are_held_one_at_a_time(folder, tmp_path, monkeypatch, verb):
    seen, most = [], []

    def counted(folder):
        for tree in read_trees(folder):
            seen.append(weakref.ref(tree))
            most.append(sum(each() is not None for each in seen))
            yield tree

    monkeypatch.setattr(command, "read_trees", counted)
    assert store(verb, folder, *(["--out", tmp_path / "out.jsonl"] if verb == "export" else [])) == 0
    assert len(most) == COUNT and max(most) <= 3


@pytest.mark.parametrize(
    "args, said",
    [
        ([], 'expected "verb" to be one of {list,show,export,merge}'),
        (["lst", "@/trees"], "invalid choice: 'lst'"),
        (["list"], "required: list.folder"),
        (["list", "@/nowhere"], "nowhere is no store"),
        (["list", "@/trees", "--verdict", "rihgt"], "'rihgt' (choose from 'right'"),
        (["list", "@/trees", "--limit", "-1"], "limit is -1"),
        (["list", "@/trees", "--uses", "verfy"], "no path in @/trees has a tag 'verfy'; use one of analyze, clarify"),
        (["list", "@/trees", "--kind", "plain"], "is a store of trees, which have no kind"),
        (["list", "@/paths", "--verdict", "right"], "is a store of trajectories, which have no verdict"),
        (["show", "@/trees"], "required"),
        (["show", "@/trees", "--problem", "nobody"], "has no tree of 'nobody'; `rftt store list @/trees`"),
        (["show", "@/paths", "--problem", "w/0"], "is a store of trajectories, not of trees"),
        (["export", "@/trees"], "required"),
        (["export", "@/trees", "--lacks", "verfy", "--out", "@/x"], "'verfy'"),
        (["export", "@/trees", "--out", "@/trees"], "cannot write '@/trees'"),
        (["merge", "@/out"], "required: merge.folders"),
        (["merge", "@/out", "@/trees", "@/paths"], "is a store of trajectories, not of trees"),
        (["merge", "@/out", "@/trees", "@/other"], "other settings (seed: 0 there, 1 here)"),
        (["merge", "@/other", "@/trees"], "holds a store already"),
    ],
)
def test_mistakes_are_one_line_and_write_nothing(folder, grown, tmp_path, capsys, args, said):
    write_trajectories(tmp_path / "paths", paths(), {})
    write(tmp_path / "other", grown[:1], {"seed": 1})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert store(*(arg.replace("@", str(tmp_path)) for arg in args)) == 2
    out, err = capsys.readouterr()
    assert not out and err.count("\n") == 1 and said.replace("@", str(tmp_path)) in err, err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.slow
def test_the_experiment_on_scale_runs(tmp_path):
    script = Path(__file__).parents[2] / "experiments" / "store-scale" / "run.py"
    command = [sys.executable, script, "--trees", "24", "--out", tmp_path / "scale"]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "scale" / "results.json").read_text())
    assert results["written_nodes_at_least"] == 3600 and results["load TreeDataModule"]["records"] > 24 * 25
    assert all(row["peak_MB"] < 2000 for row in results.values() if isinstance(row, dict) and "peak_MB" in row)
