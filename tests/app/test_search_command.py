"""``rftt search`` with a scripted backend: what is stored, what is skipped, what a killed run loses (nothing), what is refused."""

import functools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from rftt_lightning.app import cli
from rftt_lightning.app.plan import Costs, scaled
from rftt_lightning.app.search import harvest
from rftt_lightning.core.contracts import Status
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.search.driver import Progress, grow
from rftt_lightning.search.expand import TokenExpander
from rftt_lightning.search.store import manifest, read_trees, shards
from scripted import ScriptedBackend, ScriptedReward, ScriptedSource

COUNT, ROLLOUTS = 7, 5
TABLE = TokenTable.from_yaml()


class Source(ScriptedSource):
    """As a user writes one: by class_path."""

    def __init__(self, count: int = COUNT, answer: str = "one") -> None:
        super().__init__(count, answer)


class Fast(ScriptedBackend):
    calls, batch_size = 0, 20

    def __init__(self, name: str = "scripted") -> None:
        super().__init__()
        self.name = name

    def generate(self, requests):
        type(self).calls += 1
        return super().generate(requests)


class Slow(Fast):
    """Leaves time to be killed in."""

    def generate(self, requests):
        time.sleep(0.05)
        return super().generate(requests)


class Reward(ScriptedReward):
    def __init__(self) -> None:
        super().__init__()


@pytest.fixture
def config(tmp_path):
    """A config file of a prompt-guided search into ``tmp_path/out``."""
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name in TABLE.names:
        (prompts / f"{name}.txt").write_text(name)
    path = tmp_path / "search.yaml"
    settings = {
        "source": {"class_path": f"{__name__}.Source"},
        "backend": {"class_path": f"{__name__}.Fast"},
        "expander": {
            "class_path": "rftt_lightning.search.expand.PromptExpander",
            "init_args": {"prompts": str(prompts), "rollouts": ROLLOUTS},
        },
        "reward": {"class_path": f"{__name__}.Reward"},
        "out": str(tmp_path / "out"),
        "concurrency": 2,
    }
    path.write_text(yaml.safe_dump(settings))
    return path


def search(config: Path, *args: object) -> int:
    return cli.main(["search", "--config", str(config), *map(str, args)])


def trees(folder: Path) -> dict:
    """Trees by problem id; fails if one is there twice."""
    found = list(read_trees(folder))
    for tree in found:
        tree.check()
    assert len({tree.problem.id for tree in found}) == len(found)
    return {tree.problem.id: tree for tree in found}


def test_every_problem_gets_a_tree_and_every_rollout_a_verdict(config, tmp_path, capsys):
    assert search(config) == 0
    grown, summary = trees(tmp_path / "out"), json.loads((tmp_path / "out" / "summary.json").read_text())
    assert set(grown) == {problem.id for problem in Source().problems()}
    rollouts = [rollout for tree in grown.values() for rollout in tree.rollouts()]
    assert summary["problems"] == COUNT and summary["rollouts"] == len(rollouts) == sum(
        summary[s.value] for s in Status
    )
    assert summary["rollout_accuracy"] == sum(r.score.verdict.right for r in rollouts) / len(rollouts)
    assert summary["any_right"] == sum(any(r.score.verdict.right for r in t.rollouts()) for t in grown.values()) / COUNT
    costs = summary["costs"]
    assert costs["trees"] == COUNT and costs["rollouts"] == len(rollouts) and costs["seconds"] > 0
    assert costs["tokens"] == summary["generated_tokens"] <= costs["computed"] and 0 < costs["idle"] < 1
    shown = capsys.readouterr().out
    assert "rollout_accuracy" in shown and "model idle" in shown and "predicted" not in shown
    for tree in grown.values():
        for node in range(1, len(tree)):
            assert tree.tag(node) in TABLE.prompted[tree.tag(tree.parent[node])]


def test_what_is_complete_is_not_done_again(config, tmp_path):
    search(config)
    before, summary = shards(tmp_path / "out", "trees")[0].read_bytes(), (tmp_path / "out" / "summary.json").read_text()
    calls = Fast.calls
    assert search(config) == 0
    assert Fast.calls == calls
    assert shards(tmp_path / "out", "trees")[0].read_bytes() == before
    assert (tmp_path / "out" / "summary.json").read_text() == summary
    (tmp_path / "out" / "summary.json").write_text('{"sec')  # torn
    assert search(config) == 0
    assert search(config, "--overwrite", "true") == 0 and Fast.calls > calls
    assert shards(tmp_path / "out", "trees")[0].read_bytes() == before


def test_more_problems_go_on_where_fewer_ended(config, tmp_path):
    search(config, "--source.init_args.count", COUNT - 4)
    search(config)
    search(config, "--out", tmp_path / "straight")
    assert trees(tmp_path / "out") == trees(tmp_path / "straight")


def test_a_run_that_was_refused_binds_none_that_follows(config, tmp_path):
    assert search(config, "--seed", 1, "--concurrency", 0) == 2
    assert search(config) == 0
    assert manifest(tmp_path / "out", "trees")["settings"]["seed"] == 0


def test_seconds_of_an_interrupted_search_count(config, tmp_path, monkeypatch):
    def breaks_off(*args, progress, **settings):
        for number, grown in enumerate(grow(*args, progress=progress, **settings)):
            if number == 3:
                raise KeyboardInterrupt
            yield grown

    def seconds() -> float:
        return json.loads((tmp_path / "out" / "summary.json").read_text())["costs"]["seconds"]

    monkeypatch.setattr(Progress, "seconds", 5.0)
    with monkeypatch.context() as patch:
        patch.setattr("rftt_lightning.app.search.driver.grow", breaks_off)
        assert search(config) == cli.INTERRUPTED
    assert seconds() == 5.0 and len(trees(tmp_path / "out")) == 3
    assert search(config) == 0 and seconds() == 10.0
    assert search(config, "--overwrite", "true") == 0 and seconds() == 5.0


@pytest.mark.parametrize("noted, seconds", [(4, 9.0 * COUNT / 4), (COUNT, 9.0), (0, math.nan)])
def test_trees_whose_costs_were_lost_are_not_free(tmp_path, noted, seconds):
    """Seven trees, of which the costs of so many survived, 9 s."""

    def run():
        given = (Source(), Fast(), TokenExpander(rollouts=ROLLOUTS), Reward())
        return harvest(*given, tmp_path, seed=0, concurrency=2)

    run()
    kept = Costs(trees=noted, rollouts=1, seconds=9.0 if noted else 0.0)
    (tmp_path / "summary.json").write_text(json.dumps(kept.to_json()))
    grown, found = run()
    assert len(grown) == COUNT and found == pytest.approx(seconds, nan_ok=True)


def test_functional_tokens_work_in_place_of_prompts(config, tmp_path):
    tokens = ["--expander", "rftt_lightning.search.expand.TokenExpander", "--expander.rollouts", ROLLOUTS]
    assert search(config, *tokens) == 0
    for tree in trees(tmp_path / "out").values():
        for rollout in tree.rollouts():
            assert TABLE.is_legal(step.tag for step in rollout.steps)


def test_a_tree_begins_no_rollout_beyond_its_limits(config, tmp_path):
    """In tokens exactly, and the same whatever grows beside it; in seconds at least one rollout is made."""
    few = ["--limits.tokens", 8]
    assert search(config, *few) == 0
    assert search(config, *few, "--out", tmp_path / "alone", "--concurrency", 1) == 0
    limited = trees(tmp_path / "out")
    assert limited == trees(tmp_path / "alone")
    assert search(config, "--out", tmp_path / "whole") == 0
    for name, whole in trees(tmp_path / "whole").items():
        spent, rollouts = 0, 0
        seen: set[int] = set()
        for rollout in whole.rollouts():
            if spent >= 8:
                break
            spent += sum(len(whole.segments[k].tokens) for k in set(rollout.nodes) - seen)
            seen |= set(rollout.nodes)
            rollouts += 1
        assert len(limited[name].leaves) == rollouts
    assert search(config, "--limits.seconds", 1e-9, "--out", tmp_path / "hurried") == 0
    assert all(len(tree.leaves) == 1 for tree in trees(tmp_path / "hurried").values())
    assert search(config, "--limits.seconds", 0) == 2


def test_a_plan_foretells_what_the_search_takes(config, tmp_path, capsys):
    """With a backend whose trees are alike, to a quarter; nothing is grown into the store meanwhile."""
    more = ["--source.init_args.count", 60, "--concurrency", 20, "--backend.init_args.name", "planned"]
    assert search(config, *more, "--plan", "true") == 0
    assert "predicted" in capsys.readouterr().out and not shards(tmp_path / "out", "trees")
    predicted = json.loads((tmp_path / "out" / "plan.json").read_text())["costs"]
    assert search(config, *more) == 0
    shown = capsys.readouterr().out
    assert "predicted" in shown and "real" in shown
    real = json.loads((tmp_path / "out" / "summary.json").read_text())["costs"]
    assert predicted["trees"] == real["trees"] == 60
    for name in ("rollouts", "tokens", "computed"):
        assert predicted[name] == pytest.approx(real[name], rel=0.25), name
    assert search(config, "--plan", "true", "--plan_seconds", 0) == 2


def test_a_plan_scales_what_was_found():
    """A full batch of 8 rows made 100 calls in 10 s; with its end, at 5 rows, the calibration took 200 calls and 16 s."""
    found = Costs(4, 20, 200, 900, 1000, 5000, 16.0, 0.3, 5.0)
    full = Costs(0, 8, 100, 300, 350, 4000, 10.0, 0.1, 8.0)
    costs = scaled(found, full, 60, 12, kept=3000, budget=7000)
    assert (costs.trees, costs.rollouts, costs.tokens, costs.computed) == (12, 60, 2700, 3000)
    assert costs.calls == 375 and costs.seconds == 37.5  # 200 x 5 x 3 rows at 8 a call
    assert costs.cache_bytes == 7000 + 2000 and (costs.idle, costs.rows) == (0.1, 8.0)
    served = scaled(replace(found, rows=0.0), replace(full, rows=0.0), 60, 12, kept=0, budget=0)
    assert served.seconds == pytest.approx(10 * 3 * 1000 / 350) and served.cache_bytes == 5000


def test_costs_of_two_runs_add_up():
    one, two = Costs(1, 2, 3, 4, 5, 6, 10.0, 0.5, 8.0, {"timeout": 1}), Costs(10, 20, 30, 40, 50, 5, 30.0, 0.1, 4.0)
    assert one + two == Costs(11, 22, 33, 44, 55, 6, 40.0, pytest.approx(0.2), 5.0, {"timeout": 1})


def test_a_calibration_ends_in_time_and_asks_of_all_the_source(config, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(Fast, "batch_size", 3)
    monkeypatch.setattr(
        "rftt_lightning.app.plan.driver.grow",
        lambda problems, *a, **s: seen.extend(problems) or grow(problems, *a, **s),
    )
    many = ["--expander.init_args.rollouts", 10**6, "--plan", "true", "--backend", f"{__name__}.Slow"]
    began = time.monotonic()
    assert search(config, *many, "--plan_seconds", 0.5) == 0
    assert time.monotonic() - began < 10
    assert [problem.id for problem in seen] == ["scripted/0", "scripted/3"]  # two trees grow at a time
    found = Costs.read(tmp_path / "out" / "plan.json")
    assert found.rollouts == COUNT * 10**6 and found.seconds > 1000


def test_a_plan_of_other_settings_is_not_shown(config, capsys):
    assert search(config, "--plan", "true") == 0
    capsys.readouterr()
    assert search(config, "--expander.init_args.rollouts", 2) == 0
    shown = capsys.readouterr().out
    assert "real" in shown and "predicted" not in shown


def begin(config: Path, out: Path, count: int = 1) -> subprocess.Popen:
    """A search in a process of its own that has stored so many trees, or a few more, and not all."""
    root = Path(__file__).resolve().parents[2]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (root, root / "tests", root / "tests" / "app")))}
    slow = ["--backend", f"{__name__}.Slow", "--out", str(out)]
    command = [sys.executable, "-m", "rftt_lightning", "search", "--config", str(config), *slow]
    heard = functools.partial(
        signal.signal, signal.SIGINT, signal.SIG_DFL
    )  # a shell's background jobs, as tests may be, ignore it
    process = subprocess.Popen(
        command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heard
    )
    while sum(path.read_bytes().count(b"\n") for path in shards(out, "trees")) < count:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    return process


def test_killed_and_resumed_is_straight(config, tmp_path):
    process = begin(config, tmp_path / "out", 2)
    process.kill()
    process.communicate()
    path = shards(tmp_path / "out", "trees")[0]
    grown = path.read_bytes().count(b"\n")
    assert 0 < grown < COUNT
    killed = Costs.read(tmp_path / "out" / "summary.json")
    assert grown - 1 <= killed.trees <= grown and killed.seconds > 0
    with path.open("ab") as file:  # as if it had been killed while it wrote
        file.write(b'{"id":"scripted/6","problem":{"id":')
    assert search(config, "--concurrency", 3) == 0
    search(config, "--out", tmp_path / "straight")
    assert trees(tmp_path / "out") == trees(tmp_path / "straight")
    costs = Costs.read(tmp_path / "out" / "summary.json")
    assert costs.trees == COUNT - grown + killed.trees and costs.seconds > killed.seconds


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_asked_to_stop_it_says_one_line_and_keeps_its_trees(config, tmp_path, kind):
    process = begin(config, tmp_path / "out")
    process.send_signal(kind)
    _, said = process.communicate(timeout=30)
    assert process.returncode == cli.INTERRUPTED
    assert said.splitlines() == ["rftt: interrupted; long commands go on where they were when started again"]
    assert 0 < len(trees(tmp_path / "out")) < COUNT


@pytest.mark.parametrize(
    "args, said",
    [
        (["--seed", "1"], r"seed: 0 there, 1 here"),
        (["--expander.init_args.rollouts", "6"], r"expander\.rollouts: 5 there, 6 here"),
        (
            ["--expander.init_args.sampling.temperature", "0.5"],
            r"expander\.sampling\.temperature: 0\.7 there, 0\.5 here",
        ),
        (["--backend.init_args.name", "other"], r'backend: "scripted" there, "other" here'),
        (["--parallel", "2"], r"parallel: 1 there, 2 here"),
        (["--limits.tokens", "99"], r"limits.tokens: null there, 99 here"),
        (["--source.init_args.answer", "two"], r"another problem with the id 'scripted/0'"),
        (["--concurrency", "0"], r"concurrency is 0; it must be at least 1"),
        (["--held_out+", f"{__name__}.Source"], r"overlap.*allow_overlap"),
        (["--out", "/proc/nowhere"], r"cannot write to /proc/nowhere.*another --out"),
        (["--out="], r"--out is empty; give a folder"),
    ],
)
def test_mistakes_are_one_line_and_leave_the_store_alone(config, tmp_path, capsys, args, said):
    search(config)
    files = shards(tmp_path / "out", "trees")[0], tmp_path / "out" / "config.yaml"
    before = [file.read_bytes() for file in files]
    capsys.readouterr()
    assert search(config, *args) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(said, err), err
    assert [file.read_bytes() for file in files] == before


def test_an_overlap_may_be_allowed(config):
    assert search(config, "--held_out+", f"{__name__}.Source", "--allow_overlap", "true") == 0
