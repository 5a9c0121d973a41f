"""``rftt curate`` with scripted trees and verify texts: the report adds up, and the result is whole, repeatable and legal."""

import json
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rftt_lightning.app import cli
from rftt_lightning.core.contracts import Completion, Segment
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.search.driver import grow
from rftt_lightning.search.expand import PromptExpander, dialogue
from rftt_lightning.search.store import MANIFEST, Store, read_trajectories, shards
from scripted import ScriptedBackend, ScriptedReward, ScriptedSource, shuffled, uniform

COUNT = 40
TABLE = TokenTable.from_yaml()


class Source(ScriptedSource):
    def __init__(self, count: int = COUNT, asks: str = "what") -> None:
        super().__init__(count)
        self.list = [replace(p, question=p.question.replace("what", asks)) for p in self.list]


class Checker(ScriptedBackend):
    """Verifies as it pleases, by the request: right, wrong, or neither; ``fails`` as if it ran out of memory."""

    calls = 0

    def __init__(self, fails: bool = False) -> None:
        super().__init__()
        self.name, self.fails = "checker", fails

    def generate(self, requests):
        type(self).calls += 1
        if self.fails:
            raise MemoryError("no room")
        said = ("Verdict: wrong", "verdict:  Correct", "who knows", "Verdict: wrong, <verify> as it is")
        texts = [said[int(4 * uniform(request.seed))] for request in requests]
        return [Completion((Segment("verify", (1,), (0.0,), (0,), text, True),)) for text in texts]


@pytest.fixture(scope="module")
def grown(tmp_path_factory):
    """Finished trees; those of the first problems in a store of 12."""
    prompts = tmp_path_factory.mktemp("prompts")
    for name in TABLE.names:
        (prompts / f"{name}.txt").write_text(name)
    expander = PromptExpander(prompts=str(prompts), rollouts=8)
    source = Source()
    found = grow(source.problems(), expander, ScriptedBackend(TABLE, stop=0.4), ScriptedReward(TABLE), source)
    return [tree for _, tree in found]


def store(folder: Path, trees) -> None:
    made = Store(folder, "trees", {"seed": 0})
    for tree in trees:
        made.add(tree.problem.id, tree.to_json())
    made.close()


@pytest.fixture
def config(tmp_path, grown):
    store(tmp_path / "trees", grown)
    path = tmp_path / "curate.yaml"
    settings = {
        "trees": str(tmp_path / "trees"),
        "source": {"class_path": f"{__name__}.Source"},
        "backend": {"class_path": f"{__name__}.Checker"},
        "curator": {"alpha": 0.0, "verify_share": 0.5, "seed": 3},
        "out": str(tmp_path / "out"),
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def curate(config: Path, *args: object) -> int:
    return cli.main(["curate", "--config", str(config), *map(str, args)])


def files(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in (*shards(folder, "trajectories"), folder / "report.json")]


def test_the_report_adds_up_and_everything_kept_is_legal(config, tmp_path, capsys):
    assert curate(config) == 0
    report, made = json.loads((tmp_path / "out" / "report.json").read_text()), list(read_trajectories(tmp_path / "out"))
    assert report["trees"] == COUNT and report["kept"] == len(made) > 0
    assert {kind: row["count"] for kind, row in report["kinds"].items()} == Counter(t.kind for t in made)
    used = Counter(step.tag for t in made for step in t.steps)
    assert {tag: row["count"] for tag, row in report["tokens"].items()} == used
    assert sum(row["share"] for row in report["tokens"].values()) == pytest.approx(1)
    for reason in (
        "verify: contradicts the known verdict",
        "verify: gives no clear verdict",
        "a functional tag inside a step's text",
    ):
        assert report["rejected"][f"merged: {reason}"] > 0
    # Every tree is accounted for: it has no correct path, or its plain draft is kept or rejected.
    plain = sum(
        n for reason, n in report["rejected"].items() if reason.startswith("plain: ") and "final check" not in reason
    )
    assert report["rejected"].get("tree: no correct path", 0) + plain + report["kinds"]["plain"]["count"] == COUNT
    for trajectory in made:
        tags = [step.tag for step in trajectory.steps]
        assert TABLE.is_legal(tags) and tags[-1] == "output" and len(trajectory.train) == len(tags)
        assert TABLE.parse(TABLE.render(trajectory.steps)) == list(trajectory.steps)
        assert ("refine" in tags) == (trajectory.kind == "merged")
    said = capsys.readouterr().out
    assert "kept, merged" in said and "contradicts the known verdict" in said


def test_neither_the_order_of_trees_nor_the_size_of_chunks_matters(config, tmp_path, grown, monkeypatch):
    curate(config)
    store(tmp_path / "other", shuffled(grown, 1))
    monkeypatch.setattr("rftt_lightning.search.curate.Curator.curate.__defaults__", (3,))
    curate(config, "--trees", tmp_path / "other", "--out", tmp_path / "out2")
    assert files(tmp_path / "out") == files(tmp_path / "out2")
    curate(config, "--curator.seed", 4, "--out", tmp_path / "out3")
    assert files(tmp_path / "out") != files(tmp_path / "out3")


def test_what_is_done_is_skipped_until_something_changes(config, tmp_path):
    curate(config, "--out", tmp_path / "out")
    calls, before = Checker.calls, files(tmp_path / "out")
    assert curate(config) == 0 and Checker.calls == calls
    assert curate(config, "--overwrite", "true") == 0 and Checker.calls > calls
    assert files(tmp_path / "out") == before
    assert curate(config, "--curator.verify_share", 0) == 0
    assert files(tmp_path / "out") != before


def test_more_trees_are_curated_anew(config, tmp_path, grown):
    store(tmp_path / "growing", grown[:-5])
    curate(config, "--trees", tmp_path / "growing")
    some = files(tmp_path / "out")
    store_again = Store(tmp_path / "growing", "trees", {"seed": 0})
    for tree in grown[-5:]:
        store_again.add(tree.problem.id, tree.to_json())
    store_again.close()
    curate(config, "--trees", tmp_path / "growing")
    assert files(tmp_path / "out") != some
    assert json.loads((tmp_path / "out" / "report.json").read_text())["trees"] == COUNT


def test_other_trees_in_the_same_folder_are_curated_anew(config, tmp_path, grown):
    half = len(grown) // 2
    for name, trees in (("first", grown[:half]), ("second", grown[half:])):
        store(tmp_path / name, trees)
        curate(config, "--trees", tmp_path / name, "--out", tmp_path / f"{name} alone")
    curate(config, "--trees", tmp_path / "first")
    (tmp_path / "first").rename(tmp_path / "gone")
    (tmp_path / "second").rename(tmp_path / "first")  # as many trees, of the same settings
    curate(config, "--trees", tmp_path / "first")
    assert files(tmp_path / "out") == files(tmp_path / "second alone") != files(tmp_path / "first alone")


def test_a_run_that_breaks_off_leaves_the_earlier_result(config, tmp_path, capsys):
    curate(config)
    before = files(tmp_path / "out")
    assert curate(config, "--overwrite", "true", "--backend.init_args.fails", "true") == 1
    assert files(tmp_path / "out") == before
    assert "MemoryError" in capsys.readouterr().err


@pytest.mark.parametrize(
    "args, said",
    [
        (["--trees", "nowhere"], "nowhere is no store of trees"),
        (["--out", "{trees}"], "is a store of trees, not of trajectories"),
        (["--curator.alpha", "2"], "alpha"),
        (["--curator.affirms", "("], r"curator\.affirms is no regular expression"),
        (["--curator.prompts", "nowhere"], r"cannot read nowhere/\w+\.txt"),
        (["--curator.preparing", "[dream]"], "needs the functional token 'dream'"),
        (["--curator.max_tokens", "0"], r"curator\.max_tokens is 0"),
        (["--source.init_args.count", f"{COUNT - 1}"], f"no problem 'scripted/{COUNT - 1}'"),
        (["--source.init_args.asks", "which"], r"no problem 'scripted/\d+' with the question"),
        (["--out="], "--out is empty"),
    ],
)
def test_mistakes_are_one_line(config, tmp_path, capsys, args, said):
    before = (tmp_path / "trees" / MANIFEST).read_bytes(), shards(tmp_path / "trees", "trees")[0].read_bytes()
    assert curate(config, *[arg.replace("{trees}", str(tmp_path / "trees")) for arg in args]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(said, err), err
    assert before == ((tmp_path / "trees" / MANIFEST).read_bytes(), shards(tmp_path / "trees", "trees")[0].read_bytes())


def test_trees_without_a_correct_path_leave_an_empty_result_and_a_reason(config, tmp_path, grown, capsys):
    hopeless = [tree for tree in grown if not any(r.score.verdict.right for r in tree.rollouts())]
    store(tmp_path / "hopeless", hopeless)
    assert curate(config, "--trees", tmp_path / "hopeless") == 0
    assert not list(read_trajectories(tmp_path / "out"))
    assert "no tree has a correct path" in capsys.readouterr().out


def test_shipped_prompts_ask_for_every_step_and_show_the_correct_ones():
    folder = Path(cli.__file__).parents[1] / "search" / "prompts"
    prompts = {path.stem: path.read_text() for path in folder.glob("*.txt")}
    assert set(prompts) == {*TABLE.names, "cot"}
    assert not any(tag in text for tag in TABLE.tags for text in prompts.values())
    assert "{correct_steps}" in prompts["verify"]
    for name in ("direct_answer", "output", "cot"):
        assert r"\boxed{}" in prompts[name]
    for chat in (dialogue("q?", [], prompts, name) for name in prompts):
        assert chat[-1].role == "user" and chat[-1].content.startswith("q?\n\n")
