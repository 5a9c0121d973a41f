"""What a step learns from: dead groups, further problems, stored trees; and which weights a run leaves behind."""

import gzip
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rftt_lightning.app.cli import main
from rftt_lightning.core.contracts import Status
from rftt_lightning.core.tree import Tree
from rftt_lightning.search import driver
from rftt_lightning.search.store import read_trees
from rftt_lightning.tiny.countdown import Countdown
from rftt_lightning.training import loop
from rftt_lightning.training.problems import ProblemDataModule
from training.test_rl import contents, fit, gradients, learned, said, same  # noqa: F401  a fixture

HALF = {"class_path": "scripted.LateReward", "init_args": {"wrong": 0.5}}
ONE = ["--trainer.max_steps=1", "--trainer.mini_batches=1", "--trainer.gradient_clip=1e9"]
FILTER = "--trainer.filter_dead=true"
PAIRS = ["--data.batch_size=8", "--data.seed=1", "--trainer.expander.init_args.rollouts=2"]  # of which half are dead


def reward(**settings: float) -> str:
    return f"--trainer.reward={json.dumps({**HALF, 'init_args': settings})}"


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def outcomes(out: Path, step: int = 0) -> list[set[bool]]:
    """By problem of a step: which outcomes its rollouts have."""
    trees = [tree for tree in read_trees(out / "rollouts") if tree.segments[tree.leaves[0][0]].version == step]
    return [{score.verdict.status is Status.RIGHT for _, score in tree.leaves} for tree in trees]


def test_what_is_compared_with_others_is_compared_with_all_of_the_step(tmp_path):
    """However many rollouts end at the same time: rewards less their mean add up to 0, and the machine's settings move nothing."""
    compared = f"--trainer.reward={json.dumps({'class_path': 'scripted.ComparedReward', 'init_args': {}})}"
    for name, rows in (("narrow", 2), ("wide", 64)):
        assert fit(tmp_path / name, compared, *ONE, f"--trainer.decode_batch={rows}") == 0
    (narrow,), (wide,) = (metrics(tmp_path / name) for name in ("narrow", "wide"))
    assert narrow["reward"] == pytest.approx(0.0, abs=1e-6) == wide["reward"]
    assert narrow["grad_norm"] == pytest.approx(wide["grad_norm"], rel=1e-3) and wide["grad_norm"] > 1e-3


# -- dead groups ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("advantage", ["reinforce++", "grpo"])
def test_dead_groups_are_counted_and_filtered_as_if_they_were_not_there(gradients, monkeypatch, tmp_path, advantage):  # noqa: F811
    """Loss and advantages are means over the tokens of what is left."""
    options = [reward(wrong=0.5), *ONE, *PAIRS, f"--model.advantage={advantage}"]
    everything, line = gradients(*options)
    found = outcomes(tmp_path / "run-0")
    dead = {True: found.count({True}), False: found.count({False})}
    assert len(found) == line["problems"] == 8 and min(dead.values()) > 0 and sum(dead.values()) < 8
    filtered, other = gradients(*options, FILTER)
    for seen in (line, other):
        assert seen["groups/all_right"] == dead[True] / 8 and seen["groups/all_wrong"] == dead[False] / 8
    assert line["filtered"] == 0 < other["filtered"] < other["rollouts"] == line["rollouts"]
    assert not same(everything, filtered)

    whole = Tree.rollouts

    def mixed(tree: Tree) -> list:
        found = whole(tree)
        return found if len(found) == 1 or len({r.score.verdict.right for r in found}) == 2 else []  # 1: validation

    monkeypatch.setattr(Tree, "rollouts", mixed)
    absent, alone = gradients(*options)
    assert same(filtered, absent) and alone["rollouts"] == other["rollouts"] - other["filtered"]
    assert all(alone[name] == other[name] for name in ("loss", "reward", "kl", "sampler_gap", "grad_norm"))


def test_what_timed_out_makes_no_group_alive(gradients):  # noqa: F811
    """All others are right, so all groups are dead: nothing is learned."""
    nothing, line = gradients(reward(share=0.5), *ONE, FILTER)
    assert not nothing and "loss" not in line
    assert line["dropped"] == line["verdicts/timed_out"] > 0
    assert line["filtered"] == line["rollouts"] - line["dropped"]
    assert not {"reward", "kl", "sampler_gap", "sampler_gap_alarm"} & line.keys() and line["groups/all_right"] == 1


def test_as_many_further_problems_are_rolled_out_as_were_left_out(tmp_path):
    options = [reward(wrong=0.5), *ONE, FILTER, *PAIRS]
    assert fit(tmp_path, *options, "--trainer.refill=9") == 0
    data = ProblemDataModule(Countdown("train", count=40), Countdown("validation", count=8), batch_size=8, seed=1)
    trees = list(read_trees(tmp_path / "rollouts"))
    alive = [len({score.verdict.right for _, score in tree.leaves}) == 2 for tree in trees]
    expected, taken = [problem.id for problem in data.batch(0)], 0
    while len(expected) > taken:
        missing = 8 - sum(alive[: len(expected)])
        taken, expected = len(expected), expected + [p.id for p in data.further(0, len(expected) - 8, missing)]
    assert [tree.problem.id for tree in trees] == expected and sum(alive) == 8 < len(alive)
    (line,) = metrics(tmp_path)
    assert line["problems"] == len(trees) and line["groups/all_right"] + line["groups/all_wrong"] > 0


def test_refill_ends_where_it_is_said_to_though_nothing_is_alive(tmp_path):
    assert fit(tmp_path, reward(wrong=0.0), *ONE, FILTER, "--trainer.refill=2") == 0
    (line,) = metrics(tmp_path)
    assert line["problems"] == 3 * 4 and line["groups/all_right"] == 1 and "loss" not in line


def test_further_problems_are_others_and_hang_on_seed_and_step_alone():
    data = ProblemDataModule(Countdown("train", count=12), Countdown("validation", count=2), batch_size=4, seed=3)
    parts = [*data.further(1, 0, 3), *data.further(1, 3, 2), *data.further(1, 5, 9)]
    assert parts == data.further(1, 0, 8) and data.further(1, 8, 5) == []
    assert {p.id for p in parts} | {p.id for p in data.batch(1)} == {p.id for p in data.train.problems()}
    assert parts != data.further(4, 0, 8)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--trainer.refill=1"], "trainer.refill is 1; it must be 0, or more with trainer.filter_dead true"),
        ([FILTER, "--trainer.refill=-1"], "trainer.refill is -1"),
        (["--trainer.reuse=none"], "trainer.reuse is none; use steps or trees"),
        (["--trainer.strategy=fsdp"], "trainer.strategy is fsdp; use auto or ddp"),
        (["--trainer.export=first"], "trainer.export is first; use last, or best"),
        (["--trainer.export=best", "--trainer.greedy=null"], "trainer.export is best; use last, or best with trainer.greedy"),
        (["--model.trainable=some"], "model.trainable is 'some'"),
        (["--model.lora.rank=0"], "rank >= 1"),
        (["--model.reference_reset=0"], "model.reference_reset is 0; it must be null or at least 1"),
        (["--ckpt_path=best"], "there is no best checkpoint"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line_and_exit_2(tmp_path, capfd, options, words):
    assert fit(tmp_path, *options) == 2
    assert words in said(capfd)


# -- stored trees --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rl") / "run"
    assert fit(out, reward(wrong=0.5), "--trainer.keep=9") == 0
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


@pytest.fixture
def grown(monkeypatch) -> list[str]:
    """The problems of which trees are grown to learn from, as they are begun."""
    seen, grow = [], driver.grow

    def watched(problems, expander, *args, **kwargs):
        seen.extend(problem.id for problem in problems if expander.rollouts > 1)
        return grow(problems, expander, *args, **kwargs)

    monkeypatch.setattr(driver, "grow", watched)
    return seen


def back_to(out: Path, steps: int) -> None:
    """As if the run had been killed before it saved any step after these."""
    for path in (out / "checkpoints").glob("step-*.pt"):
        if int(path.stem[5:]) > steps:
            path.unlink()


def assert_equal(one: Path, other: Path) -> None:
    assert (one / "metrics.jsonl").read_bytes() == (other / "metrics.jsonl").read_bytes()
    assert all(map(torch.equal, learned(one)[1].values(), learned(other)[1].values()))
    shards = sorted((one / "rollouts").glob("trees-*"))
    assert [path.name for path in shards] == [f"trees-{step:06d}-000.jsonl.gz" for step in range(4)]
    assert all(path.read_bytes() == (other / "rollouts" / path.name).read_bytes() for path in shards)


def broken_off(out: Path) -> list[str]:
    """As if killed while step 3 grew: two trees are there, and half a third. Returns the problems of all four, those two first."""
    back_to(out, 2)
    packed = out / "rollouts" / "trees-000003-000.jsonl.gz"
    lines = gzip.decompress(packed.read_bytes()).splitlines(keepends=True)
    packed.unlink()
    (out / "rollouts" / "trees-000003-000.jsonl").write_bytes(lines[2] + lines[0] + lines[1][:50])
    return [json.loads(lines[i])["problem"]["id"] for i in (0, 2, 1, 3)]


def test_the_trees_of_finished_steps_are_read_and_a_run_is_the_straight_one(run, finished, grown):
    problems = broken_off(run)
    assert fit(run, reward(wrong=0.5), "--trainer.keep=9") == 0
    assert sorted(grown) == sorted(problems)  # none of step 2, all of step 3
    assert_equal(run, finished)


def test_also_the_trees_of_a_step_that_was_broken_off_are_read_if_so_said(run, finished, grown):
    """The others are the same but for rounding."""
    problems = broken_off(run)
    assert fit(run, reward(wrong=0.5), "--trainer.keep=9", "--trainer.reuse=trees") == 0
    assert grown == problems[2:]
    for line, straight in zip(metrics(run), metrics(finished), strict=True):
        assert line == pytest.approx(straight, rel=1e-4, abs=1e-6)
    one, other = (list(read_trees(out / "rollouts")) for out in (run, finished))
    assert [[s and s.tokens for s in tree.segments] for tree in one] == [
        [s and s.tokens for s in tree.segments] for tree in other
    ]


def test_trees_of_another_policy_are_grown_anew(run, finished, grown):
    """And take the place of those that are there."""
    back_to(run, 3)
    path = run / "rollouts" / "trees-000003-000.jsonl.gz"
    records = [json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
    other = [{**record, "policy": "0" * 16, "visits": [99]} for record in records]
    path.write_bytes(gzip.compress("".join(json.dumps(record) + "\n" for record in other).encode()))
    assert fit(run, reward(wrong=0.5), "--trainer.keep=9") == 0
    assert grown == [record["problem"]["id"] for record in records]
    assert_equal(run, finished)


@pytest.mark.parametrize("options", [["--ckpt_path=none"], ["--trainer.seed=1", "--trainer.accept_changes=true"]])
def test_a_run_that_begins_anew_grows_all_its_trees(run, grown, options):
    back_to(run, 0)
    assert fit(run, reward(wrong=0.5), "--trainer.max_steps=1", *options) == 0
    assert len(grown) == 4
    assert [path.name for path in (run / "rollouts").glob("trees-*")] == ["trees-000000-000.jsonl.gz"]


@pytest.mark.parametrize("gone", ["metrics.jsonl", "rollouts"])
def test_a_run_without_a_checkpoint_does_not_go_on_with_other_settings_and_is_left_as_it_was(run, capfd, gone):
    """Whatever it has written so far."""
    back_to(run, 0)
    left = run / gone
    shutil.rmtree(left) if left.is_dir() else left.unlink()
    before = contents(run)
    assert fit(run, reward(wrong=0.5), "--trainer.seed=1") == 2
    assert f"{run} was written with other settings (trainer.seed: 0 there, 1 here)" in said(capfd)
    assert contents(run) == before


def test_a_run_that_came_to_nothing_binds_none_that_follows(run):
    back_to(run, 0)
    shutil.rmtree(run / "rollouts")
    (run / "metrics.jsonl").write_text("")
    assert fit(run, reward(wrong=0.5), "--trainer.max_steps=1", "--trainer.seed=1") == 0


def test_fewer_steps_than_are_done_lose_nothing(run, finished, grown):
    assert fit(run, reward(wrong=0.5), "--trainer.keep=9", "--trainer.max_steps=2") == 0
    assert grown == []
    assert_equal(run, finished)


def test_settings_change_where_it_is_said_so_and_what_was_done_stays(run, finished, grown, capfd):
    back_to(run, 2)
    other = [reward(wrong=0.5), "--trainer.keep=9", "--model.lr=0.1", "--model.betas=[0.5,0.6]"]
    assert fit(run, *other) == 2 and "--trainer.accept_changes true" in said(capfd)
    assert fit(run, *other, "--trainer.accept_changes=true") == 0
    assert len(grown) == 8  # those of steps 2 and 3, though there were trees of the same weights
    lines, straight = metrics(run), metrics(finished)
    assert lines[:2] == straight[:2] and lines[3]["lr"] == pytest.approx(straight[3]["lr"] * 0.1 / 5e-4)
    names = [f"trees-{step:06d}-000.jsonl.gz" for step in range(4)]
    kept = [(run / "rollouts" / name).read_bytes() == (finished / "rollouts" / name).read_bytes() for name in names]
    assert kept[:2] == [True, True] and not kept[3]
    group = torch.load(run / "checkpoints/step-000004.pt", weights_only=True)["optimizer"]["param_groups"][0]
    assert list(group["betas"]) == [0.5, 0.6]
    assert fit(run, *other) == 0  # they are the run's own now


def test_the_trees_are_a_store_that_is_looked_into_like_any_other(finished, capfd, tmp_path):
    folder = str(finished / "rollouts")
    assert main(["store", "list", folder, "--limit=0"]) == 0
    assert "16" in capfd.readouterr().out
    (first, *_) = ProblemDataModule(Countdown("train", count=40), Countdown("validation", count=8), batch_size=4).batch(
        0
    )
    assert main(["store", "show", folder, "--problem", first.id]) == 0
    assert capfd.readouterr().out.startswith(f"{first.id}: ")
    assert main(["store", "export", folder, "--min_version=2", "--out", str(tmp_path / "late.jsonl")]) == 0
    lines = [json.loads(line) for line in (tmp_path / "late.jsonl").read_text().splitlines()]
    assert len(lines) == sum(line["rollouts"] for line in metrics(finished)[2:])
    assert {version for line in lines for version in line["versions"]} == {2, 3}


def test_without_a_store_the_numbers_are_the_same(finished, tmp_path):
    assert fit(tmp_path, reward(wrong=0.5), "--trainer.save_rollouts=false") == 0
    assert not (tmp_path / "rollouts").exists()
    assert (tmp_path / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


class Seen:
    """A callback that writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list = []

    def on_train_start(self, trainer, pl_module) -> None:
        assert trainer.folder.metrics.name == "metrics.jsonl" and trainer.logger.experiment.add_scalar
        self.calls.append("start")

    def on_step_end(self, trainer, module, metrics, trees) -> None:
        self.calls.append((metrics["problems"], [type(tree) for tree in trees], module.table.names[0]))


def test_a_callback_gets_metrics_and_trees_of_each_step(tmp_path, monkeypatch):
    seen, call = Seen(), loop.Fabric.call

    def told(fabric, hook, /, *args, **kwargs):
        call(fabric, hook, *args, **kwargs)
        getattr(seen, hook, lambda **_: None)(**kwargs)

    monkeypatch.setattr(loop.Fabric, "call", told)
    assert fit(tmp_path, "--trainer.max_steps=2") == 0
    start, *steps = seen.calls
    assert start == "start" and len(steps) == 2
    assert all(problems == 4 and trees == [Tree] * 4 for problems, trees, _ in steps)


# -- the best ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def validated(monkeypatch) -> list[float]:
    """What the validations of a run find, one after the other."""
    values = [0.2, 0.5, 0.5, 0.1]

    def validate(trainer, backend, data):
        return dict.fromkeys((f"validation/{x}" for x in ("accuracy", "low", "high")), values[backend.version]), []

    monkeypatch.setattr(loop.RLTrainer, "_validate", validate)
    return values


def bests(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("best-*"))


def test_the_best_is_kept_of_equals_the_earlier_and_exported_if_so_said(tmp_path, validated):
    every = [reward(wrong=0.5), "--trainer.validate_every=1", "--trainer.export=best"]
    assert fit(tmp_path, *every) == 0
    assert bests(tmp_path) == ["best-000002.pt"]
    best = torch.load(tmp_path / "checkpoints" / "best-000002.pt", weights_only=True)
    assert best["accuracy"] == 0.5 and best["steps"] == 2 and "optimizer" not in best
    exported = load_file(tmp_path / "hf" / "model.safetensors")
    assert all(torch.equal(weight, best["model"][name]) for name, weight in exported.items())
    assert not torch.equal(exported["model.norm.weight"], learned(tmp_path)[1]["model.norm.weight"])


@pytest.mark.parametrize("killed_after", [1, 2, 3])
def test_the_best_so_far_is_known_to_a_run_that_goes_on(tmp_path, validated, killed_after):
    every = [reward(wrong=0.5), "--trainer.validate_every=1", "--trainer.keep=9"]
    assert fit(tmp_path, *every) == 0
    assert bests(tmp_path) == [
        "best-000001.pt",
        "best-000002.pt",
    ]  # the former is what a run beats that goes on at step 1
    back_to(tmp_path, killed_after)
    validated[2:] = [0.4, 0.45]  # were the best not known, step 4 would beat it
    assert fit(tmp_path, *every) == 0
    assert bests(tmp_path)[-1] == "best-000002.pt"


def test_the_best_is_of_what_a_run_goes_back_to(tmp_path, validated):
    every = [reward(wrong=0.5), "--trainer.validate_every=1", "--trainer.keep=9"]
    assert fit(tmp_path, *every) == 0
    validated[1:] = [0.1, 0.3, 0.1]
    assert fit(tmp_path, *every, f"--ckpt_path={tmp_path / 'checkpoints' / 'step-000001.pt'}") == 0
    assert bests(tmp_path)[-1] == "best-000003.pt"


def test_the_best_is_validated_and_not_trained_on(tmp_path, capfd):
    assert fit(tmp_path, "--trainer.max_steps=1") == 0
    capfd.readouterr()
    assert fit(tmp_path, "--ckpt_path=best", command="validate") == 0
    assert json.loads(capfd.readouterr().out)["validation/accuracy"] >= 0
    assert fit(tmp_path, "--trainer.max_steps=1", "--ckpt_path=best") == 2
    assert "has weights alone" in said(capfd)
