"""RL on a tiny random model: what is learned from, and runs that repeat and resume bitwise."""

import copy
import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from lightning import Fabric
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import LlamaModel

from rftt_lightning.app.cli import main
from rftt_lightning.core.contracts import Problem, Provenance, Rollout, Score, Segment, Status, UserError, Verdict
from rftt_lightning.core.tree import Tree
from rftt_lightning.policy import objectives
from rftt_lightning.policy.vocab import load, masked_log_softmax
from rftt_lightning.search.store import LOCK
from rftt_lightning.tiny.countdown import Countdown
from rftt_lightning.training.problems import ProblemDataModule
from rftt_lightning.training.rl import MEASURED, RLModule, Work, collate

ROOT = Path(__file__).resolve().parents[2]
CONFIG = str(ROOT / "configs/tiny/rl.yaml")
BASE = "pkg:tiny/checkpoints/countdown"


def fit(out: Path, *more: str, command: str = "fit") -> int:
    small = ["--data.train.init_args.count=40", "--data.validation.init_args.count=8", "--data.batch_size=4"]
    sizes = ["--trainer.max_steps=4", "--trainer.checkpoint_every=1", "--trainer.validate_every=2"]
    rollouts = ["--trainer.expander.init_args.rollouts=3", "--trainer.expander.init_args.max_tokens=48"]
    args = [
        "rl",
        command,
        f"--config={CONFIG}",
        f"--model.model={BASE}",
        f"--trainer.out={out}",
        *small,
        *sizes,
        *rollouts,
    ]
    return main([*args, *more])


LEARNING = [  # rewards that a base model earns, so that weights move
    "--model.advantage=reinforce++",
    "--model.gamma=0.9",
    "--trainer.reward.init_args.outcome.init_args.none=1.0",
]


def said(capfd: pytest.CaptureFixture[str]) -> str:
    """The one line of an error."""
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rftt:")]
    return line


def steps_logged(out: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def learned(out: Path) -> tuple[bytes, dict[str, torch.Tensor]]:
    """The metrics file, and the final weights."""
    metrics = (out / "metrics.jsonl").read_bytes()
    newest = sorted((out / "checkpoints").glob("step-*.pt"))[-1]
    return metrics, torch.load(newest, weights_only=True)["model"]


def assert_same(one: Path, other: Path) -> None:
    (metrics, weights), (again, weights_again) = learned(one), learned(other)
    assert metrics == again and metrics.count(b"\n") == 4
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_a_run_repeats_and_resumes_bitwise(tmp_path, capfd):
    assert fit(tmp_path / "straight", *LEARNING) == 0
    assert fit(tmp_path / "again", *LEARNING) == 0
    assert_same(tmp_path / "straight", tmp_path / "again")
    start = load(BASE, "float32")[0].state_dict()
    moved = learned(tmp_path / "straight")[1]
    assert not all(torch.equal(moved[name][: len(start[name])], start[name]) for name in start)
    # a run that died after its second checkpoint, in the middle of writing metrics of the third step and another checkpoint
    dead = tmp_path / "again"
    (dead / "checkpoints" / "step-000004.pt").unlink()
    lines = (dead / "metrics.jsonl").read_text().splitlines()
    (dead / "metrics.jsonl").write_text("\n".join(lines[:3]) + '\n{"step": 3, "rew')
    (dead / "checkpoints" / "writing.tmp").write_bytes(b"half")
    assert fit(dead, *LEARNING) == 0
    assert_same(tmp_path / "straight", dead)
    assert (tmp_path / "straight" / "hf" / "model.safetensors").exists()
    assert (tmp_path / "straight" / "config.yaml").exists()
    for out in (tmp_path / "straight", dead):  # TensorBoard has every step once
        events = EventAccumulator(str(out), size_guidance={"scalars": 0, "tensors": 0}).Reload()
        assert [event.step for event in events.Scalars("reward")] == [0, 1, 2, 3]
        samples = {tag for tag in events.Tags()["tensors"] if tag.startswith("tree/sample_")}
        assert samples == {f"tree/sample_{i}/text_summary" for i in range(3)}
        text = events.Tensors("tree/sample_0/text_summary")[0].tensor_proto.string_val[0].decode()
        assert "&lt;" in text and any(f"[{status.value}]" in text for status in Status)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run of four steps that keeps all its checkpoints."""
    out = tmp_path_factory.mktemp("rl") / "run"
    assert fit(out, *LEARNING, "--trainer.keep=9") == 0
    return out


def test_killed_and_resumed_is_straight(finished, tmp_path, capfd):
    """SIGKILL once the first step is saved, wherever the run is then."""
    code = f"from tests.training.test_rl import *; fit(Path({str(tmp_path)!r}), *LEARNING, '--trainer.keep=9')"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob("checkpoints/step-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    assert process.wait() == -signal.SIGKILL and not (tmp_path / "hf").exists()
    assert fit(tmp_path, *LEARNING, "--trainer.keep=9") == 0
    assert_same(finished, tmp_path)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "run"))


def contents(out: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in out.rglob("*") if path.is_file() and path.name != LOCK}


@pytest.mark.parametrize(
    "option, words",
    [
        ("--model.lr=0.1", "model.lr: 0.0005 there, 0.1 here"),
        ("--data.train.init_args.count=41", "data.train: "),
        ("--trainer.seed=1", "settings (trainer.seed: 0 there, 1 here)"),
        ("--seed_everything=1", "data.seed: 0 there, 1 here"),
        ("--trainer.expander.init_args.c=1", "trainer.expander.c: 2.0 there, 1.0 here"),
        ("--trainer.reward.init_args.process_weight=0.1", "trainer.reward.process_weight"),
        ("--trainer.precision=bf16-mixed", "trainer.precision"),
        ("--trainer.drop_timed_out=false", "trainer.drop_timed_out: true there, false here"),
        ("--model.final_lr=0.5", "trainer.max_steps: null there, 4 here"),
        ("--ckpt_path=@/junk.pt", "junk.pt is no checkpoint, or a damaged one"),
        ("--ckpt_path=@/other.pt", "other.pt is no checkpoint of this command"),
        ("--ckpt_path=@", "no checkpoint at"),
    ],
)
def test_a_run_does_not_go_on_with_other_settings_and_is_left_as_it_was(run, capfd, option, words):
    (run / "junk.pt").write_text("no checkpoint at all")
    torch.save({"steps": 2}, run / "other.pt")
    before = contents(run)
    assert fit(run, *LEARNING, "--trainer.keep=9", option.replace("@", str(run))) == 2
    assert words in said(capfd)
    assert contents(run) == before


def test_a_run_does_not_go_on_from_other_weights(run, tmp_path, capfd):
    model, tokenizer = load(BASE, "float32")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1.0
    model.save_pretrained(tmp_path / "other")
    tokenizer.save_pretrained(tmp_path / "other")
    assert fit(run, *LEARNING, f"--model.model={tmp_path / 'other'}") == 2
    assert "model.model: " in said(capfd)


def test_what_does_not_change_the_numbers_may_change_on_resuming(run, capfd):
    free = ["--trainer.micro_batch=3", "--trainer.validate_every=3", "--trainer.keep=1", "--trainer.checkpoint_every=2"]
    assert fit(run, *LEARNING, "--trainer.max_steps=5", *free) == 0
    assert steps_logged(run) == [0, 1, 2, 3, 4]
    assert [path.name for path in (run / "checkpoints").glob("step-*")] == ["step-000005.pt"]


def test_going_back_replaces_what_came_after(run, finished, capfd):
    """Also if it is killed before its first checkpoint."""
    back = f"--ckpt_path={run / 'checkpoints' / 'step-000002.pt'}"
    assert fit(run, *LEARNING, "--trainer.max_steps=2", back) == 0
    assert steps_logged(run) == [0, 1]
    assert sorted(p.name for p in (run / "checkpoints").glob("step-*")) == ["step-000001.pt", "step-000002.pt"]
    assert "ckpt_path: null" in (run / "config.yaml").read_text()
    assert fit(run, *LEARNING) == 0
    assert_same(run, finished)


def test_validate_writes_nothing_and_prints_numbers_alone(run, capfd):
    before = contents(run)
    assert fit(run, "--model.lr=0.1", "--ckpt_path=last", command="validate") == 0
    assert set(json.loads(capfd.readouterr().out)) == {f"validation/{x}" for x in ("accuracy", "low", "high", "length")}
    assert contents(run) == before


def test_a_checkpoint_is_exported_without_training(run):
    before = contents(run)
    stale = run / "hf" / "model-00001-of-00002.safetensors"
    stale.write_text("of a larger model")
    assert fit(run, f"--ckpt_path={run / 'checkpoints/step-000002.pt'}", command="export") == 0
    assert not stale.exists()
    second = torch.load(run / "checkpoints/step-000002.pt", weights_only=True)["model"]
    found = load(str(run / "hf"), "float32")[0].state_dict()
    assert all(torch.equal(found[name], second[name]) for name in found)
    after = contents(run)
    assert {path for path in after if after[path] != before[path]} == {run / "hf" / "model.safetensors"}
    assert after.keys() == before.keys()


def test_a_nucleus_is_warned_of_where_nothing_corrects_for_it(tmp_path):
    nucleus = ["--trainer.expander.init_args.sampling.top_p=0.9", "--trainer.max_steps=1"]
    with pytest.warns(UserWarning, match="top_p 0.9.*gradient is biased"):
        assert fit(tmp_path / "biased", *LEARNING, *nucleus) == 0
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*top_p")
        assert fit(tmp_path / "corrected", *LEARNING, *nucleus, "--model.importance=truncated") == 0


def test_a_checkpoint_of_another_vocabulary_is_refused_by_validate(run, capfd):
    state = torch.load(run / "checkpoints" / "step-000002.pt", weights_only=True)
    state["model"] = {name: weight[1:] for name, weight in state["model"].items()}
    torch.save(state, run / "other.pt")
    assert fit(run, f"--ckpt_path={run / 'other.pt'}", command="validate") == 2
    assert "another vocabulary" in said(capfd)


def test_last_insists_on_a_checkpoint(tmp_path, capfd):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    assert fit(tmp_path, "--ckpt_path=last") == 2
    assert "there is no last checkpoint in" in said(capfd)
    assert steps_logged(tmp_path) == [0]


def test_one_process_trains_in_a_folder_at_a_time(run, capfd):
    before = contents(run)
    with FileLock(run / LOCK):
        assert fit(run, *LEARNING) == 2
    assert "another process is training in" in said(capfd)
    assert contents(run) == before


def test_in_mixed_precision_all_passes_are_under_autocast_and_the_ratio_begins_at_one(tmp_path, capfd, monkeypatch):
    forward, seen = LlamaModel.forward, []

    def watched(*args, **kwargs):
        seen.append(torch.is_autocast_enabled("cpu"))
        return forward(*args, **kwargs)

    monkeypatch.setattr(LlamaModel, "forward", watched)
    mixed = ["--trainer.precision=bf16-mixed", "--trainer.mini_batches=1", "--trainer.max_steps=1"]
    assert fit(tmp_path, *LEARNING, *mixed) == 0
    assert all(seen[2:]) and len(seen) > 12  # before that its parts are tried
    (line,) = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert (
        abs(line["approx_kl"]) < 1e-6
    )  # 5e-4 if one side is in float32, up to 3e-5 if the old side is rounded to bfloat16
    assert all(w.dtype == torch.float32 for w in learned(tmp_path)[1].values())


def test_fewer_rollouts_than_mini_batches(tmp_path, capfd):
    """Refused where it is so by the settings; where trees merely came out small, there are fewer updates."""
    assert fit(tmp_path, "--trainer.mini_batches=13") == 2
    assert "at most 12 rollouts" in said(capfd)
    small = ["--trainer.expander.init_args.width=1", "--trainer.expander.init_args.max_depth=1"]  # one path a tree
    assert fit(tmp_path, *LEARNING, *small, "--trainer.mini_batches=12", "--trainer.max_steps=1") == 0
    (line,) = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert line["rollouts"] < 12


def test_every_verdict_of_a_step_is_accounted_for(tmp_path, capfd):
    assert fit(tmp_path, "--trainer.max_steps=1") == 0
    (line,) = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(line[f"verdicts/{status.value}"] for status in Status) == line["rollouts"] > 0
    (times,) = [json.loads(x) for x in (tmp_path / "times.jsonl").read_text().splitlines()]
    assert times["share_rollout"] + times["share_score"] + times["share_update"] == pytest.approx(1.0)
    assert times["seconds"] > 0 and not times.keys() & line.keys() - {"step"}
    assert line["accuracy_low"] <= line["accuracy"] <= line["accuracy_high"]
    assert line["dropped"] == 0


def late(share: float, drop: bool = True) -> list[str]:
    """Options of one step and one update, whose verdicts time out in this share."""
    reward = json.dumps({"class_path": "scripted.LateReward", "init_args": {"share": share}})
    one = ["--trainer.max_steps=1", "--trainer.mini_batches=1", "--trainer.gradient_clip=1e9"]
    return [f"--trainer.reward={reward}", f"--trainer.drop_timed_out={str(drop).lower()}", *one]


@pytest.fixture
def gradients(tmp_path, monkeypatch):
    """A run of one step: its gradients (none if nothing was learned), and what it logged."""
    seen: list[list[torch.Tensor]] = []
    clip = Fabric.clip_gradients

    def watched(fabric, module, optimizer, **kwargs):
        seen.append([p.grad.clone() for p in module.parameters()])
        return clip(fabric, module, optimizer, **kwargs)

    monkeypatch.setattr(Fabric, "clip_gradients", watched)

    def of(*options: str) -> tuple[list[torch.Tensor], dict]:
        seen.clear()
        out = tmp_path / f"run-{len(list(tmp_path.iterdir()))}"
        assert fit(out, *options) == 0
        (line,) = (out / "metrics.jsonl").read_text().splitlines()
        assert "NaN" not in line
        return [grad for update in seen for grad in update], json.loads(line)

    return of


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("advantage", ["reinforce++", "reinforce++-baseline"])
@pytest.mark.filterwarnings("ignore:step 0")
def test_what_timed_out_is_as_if_it_were_not_there_or_is_learned_from(gradients, monkeypatch, advantage):
    option = f"--model.advantage={advantage}"
    everything, line = gradients(*late(0.0), option)
    assert line["dropped"] == line["verdicts/timed_out"] == 0 and line["accuracy"] == 1
    counted, line = gradients(*late(0.5, drop=False), option)
    assert same(counted, everything) and line["dropped"] == 0 < line["verdicts/timed_out"]
    dropped, line = gradients(*late(0.5), option)
    assert 0 < line["dropped"] == line["verdicts/timed_out"] < line["rollouts"]
    assert line["accuracy"] == 1 - line["dropped"] / line["rollouts"]
    assert not same(dropped, everything)

    whole = Tree.rollouts
    known = lambda tree: [r for r in whole(tree) if r.score.verdict.status is not Status.TIMED_OUT]  # noqa: E731
    monkeypatch.setattr(Tree, "rollouts", known)
    absent, other = gradients(*late(0.5, drop=False), option)
    assert same(dropped, absent) and other["rollouts"] == line["rollouts"] - line["dropped"]
    assert all(line[name] == other[name] for name in ("loss", "reward", "kl", "sampler_gap", "grad_norm"))


@pytest.mark.filterwarnings("ignore:step 0")
def test_a_step_whose_verdicts_all_timed_out_changes_nothing(gradients, tmp_path):
    nothing, line = gradients(*late(1.0), "--model.weight_decay=0.1")
    assert not nothing and line["dropped"] == line["rollouts"] > 0
    absent = {
        "reward",
        "kl",
        "sampler_gap",
        "sampler_gap_alarm",
        "groups/mixed",
        "groups/all_right",
        "groups/all_wrong",
    }
    assert not absent & line.keys(), "they would be those of no rollout"
    start = load(BASE, "float32")[0].state_dict()
    end = learned(tmp_path / "run-0")[1]
    assert all(torch.equal(end[name][: len(start[name])], start[name]) for name in start)
    some, _ = gradients(*late(1.0, drop=False))
    assert some


@pytest.mark.parametrize("share, said", [(0.0, ""), (0.5, "step 0: .* % of the verdicts timed out and were dropped")])
def test_many_verdicts_that_time_out_are_warned_of_in_one_line(tmp_path, recwarn, share, said):
    assert fit(tmp_path, *late(share)) == 0
    found = [str(w.message) for w in recwarn if "timed out" in str(w.message)]
    assert len(found) == bool(said) and all(re.match(said, line) and "\n" not in line for line in found)


@pytest.mark.parametrize("limit, rings", [(1e-9, True), (0.2, False)])
def test_a_sampler_that_is_not_of_the_trainers_opinion_is_warned_of_in_one_line(tmp_path, recwarn, limit, rings):
    assert fit(tmp_path, "--trainer.max_steps=1", f"--trainer.gap_alarm={limit}") == 0
    (line,) = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    found = [str(w.message) for w in recwarn if "between sampler and trainer" in str(w.message)]
    assert line["sampler_gap_alarm"] == len(found) == rings and line["sampler_gap"] > 0
    assert all("model.importance" in text and "\n" not in text for text in found)


def test_other_objectives_train_too(tmp_path):
    other = ["advantage=treerl", "kl=k3", "kl_in=loss", "aggregation=sequence", "importance=masked"]
    options = [*late(0.0), "--trainer.max_steps=2", *(f"--model.{option}" for option in other)]
    assert fit(tmp_path, *options) == 0
    for line in (tmp_path / "metrics.jsonl").read_text().splitlines():
        assert 0 < json.loads(line)["grad_norm"] < math.inf


@pytest.mark.parametrize(
    "option, word",
    [
        ("--trainer.nonsense=1", "nonsense"),
        ("--trainer.max_steps=0", "max_steps"),
        ("--model.advantage=best", "advantage"),
        ("--model.model=/nowhere", "nowhere"),
        ("--data.batch_size=1000", "batch_size"),
        ("--trainer.max_steps=three", "max_steps"),
        ("--trainer.gradient_clip=0", "gradient_clip is 0.0; it must be above 0"),
        ("--trainer.precision=bf16-true", "bf16-mixed"),
        ("--trainer.parallel=0", "parallel is 0"),
        ("--trainer.out=", "trainer.out is empty"),
        ("--trainer.accelerator=tpu", "trainer: "),
        ("--trainer.expander.class_path=rftt_lightning.search.expand.PromptExpander", "TokenExpander"),
        (
            "--trainer.expander.init_args.sampling.temperature=0.5",
            "samples at temperature 0.5, model.temperature is 1.0",
        ),
        ("--model.lr=0", "model.lr is 0.0; it must be above 0"),
        ("--model.kl=k4", "model.kl is 'k4'; use k1, k2 or k3"),
        ("--model.kl_in=advantage", "model.kl_in"),
        ("--model.gamma_per=node", "model.gamma_per"),
        ("--model.aggregation=mean", "model.aggregation"),
        ("--model.importance=always", "model.importance is 'always'; use none, truncated or masked"),
        ("--model.importance_cap=0.5", "model.importance_cap is 0.5; it must be at least 1"),
        ("--model.constant_length=0", "model.constant_length"),
        ("--model.argmax_weight=-1", "model.argmax_weight"),
        ("--trainer.gap_alarm=0", "gap_alarm is 0.0; it must be above 0"),
        ("--model.gamma=1.5", "model.gamma is 1.5; it must be in 0..1"),
        ("--model.betas=[0.9,1.0]", "model.betas"),
        ("--model.clip_low=-0.1", "model.clip_low is -0.1; it must be at least 0"),
        ("--model.dtype=foo", "foo"),
        ("--data.train.init_args.split=test", "overlap"),
        ("--seed_everything=-1", "seed_everything is -1"),
        ("--ckpt_path=nowhere.pt", "no checkpoint at nowhere.pt"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, capfd, option, word):
    assert fit(tmp_path, option) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rftt:")]
    assert len(error) == 1 and word in error[0]


def test_train_and_validation_may_not_overlap():
    with pytest.raises(UserError, match="overlap"):
        ProblemDataModule(Countdown("train", count=5), Countdown("train", count=5), batch_size=2)


def test_held_out_problems_are_not_trained_on_unless_it_is_allowed():
    parts = Countdown("train", count=5), Countdown("validation", count=5)
    clean, dirty = Countdown("test", count=5), Countdown("train", count=3, start=4)
    ProblemDataModule(*parts, held_out=[clean], batch_size=2)
    with pytest.raises(UserError, match="1 identical"):
        ProblemDataModule(*parts, held_out=[clean, dirty], batch_size=2)
    ProblemDataModule(*parts, held_out=[clean, dirty], batch_size=2, allow_overlap=True)


def test_problems_of_a_step_depend_on_seed_and_step_and_cover_an_epoch():
    data = ProblemDataModule(Countdown("train", count=12), Countdown("validation", count=2), batch_size=4, seed=3)
    epoch = [problem.id for step in range(3) for problem in data.batch(step)]
    assert sorted(epoch) == sorted(problem.id for problem in data.train.problems())
    assert data.batch(4) == data.batch(4) != data.batch(1)


@pytest.fixture(scope="module")
def module() -> RLModule:
    return RLModule(BASE, advantage="reinforce++-baseline", kl_beta=0.0, forced_weight=0.0)


def rollouts(module: RLModule, step: float = 0.25) -> list[Rollout]:
    """Two problems, two rollouts each, of unequal length; the second segment was forced by search. ``step`` is paid for the
    first segment."""
    names, vocabulary = module.table.names, module.vocabulary
    made = []
    for number, (length, reward) in enumerate([(1, 1.0), (3, 0.0), (2, 0.5), (2, 0.5)]):
        first, last = names.index("next_step"), names.index("output")
        word = module.tokenizer.get_vocab()["7"]
        one = (vocabulary.opens[first], *[word] * length, vocabulary.closes[first])
        two = (vocabulary.opens[last], word, vocabulary.closes[last])
        segments = (
            Segment("next_step", one, (-0.5,) * len(one), (0,) * len(one), "", True),
            Segment("output", two, (-0.5,) * 3, (int(Provenance.UCT), 0, 0), "", True),
        )
        score = Score(Verdict(Status.RIGHT), reward, (step, reward))
        made.append(Rollout(Problem(str(number // 2), "q"), (4, 5), segments, True, (), score))
    return made


def test_batch_holds_what_was_sampled_where_it_was_sampled(module):
    made = rollouts(module)
    batch = collate(made, module.vocabulary)
    for row, rollout in enumerate(made):
        response = [token for segment in rollout.segments for token in segment.tokens]
        where = batch.mask_BT[row].bool()
        assert batch.tokens_BL[row, 1:][where].tolist() == response
        assert batch.rewards_BT[row][where][[len(rollout.segments[0].tokens) - 1, -1]].tolist() == [
            0.25,
            rollout.score.rewards[1],
        ]
        assert batch.rewards_BT[row].sum() == pytest.approx(0.25 + rollout.score.rewards[1])
        allowed = module.allowed_SV[batch.states_BT[row][where], batch.tokens_BL[row, 1:][where]]
        assert allowed.all()
    assert batch.group_B.tolist() == [0, 0, 1, 1]
    assert objectives.last_positions(batch.mask_BT).tolist() == [len(r.prompt) + r.length - 2 for r in made]


def test_a_segment_without_tokens_adds_its_reward_to_the_one_before(module):
    (made, *_) = rollouts(module)
    cut = replace(made.segments[1], tokens=(), logprobs=(), provenance=())
    batch = collate([replace(made, segments=(made.segments[0], cut))], module.vocabulary)
    assert batch.rewards_BT[0][batch.mask_BT[0].bool()].tolist() == [0.0, 0.0, 1.25]  # 0.25 and 1.0


def test_forced_tokens_weigh_what_the_setting_says(module):
    batch = collate(rollouts(module), module.vocabulary)
    forced = (batch.provenance_BT == int(Provenance.UCT)) & batch.mask_BT.bool()
    weight, divisor = module.weights(batch)
    assert weight[forced].tolist() == [0.0] * 4
    assert weight.sum() == divisor == batch.mask_BT.sum() - 4


def test_baseline_compares_with_the_problem_alone(module):
    """Equal rollouts of a problem have no advantage; of unequal ones the better has all positive, the worse all negative."""
    batch = module.prepare(collate(rollouts(module, step=0.0), module.vocabulary), rows=3)
    where = batch.mask_BT.bool()
    last = [batch.advantage_BT[row][where[row]][-1] for row in range(4)]
    assert last[0] > 0 > last[1] and abs(last[2]) < 1e-5 and abs(last[3]) < 1e-5


def test_loss_over_micro_batches_is_the_loss_of_the_batch(module):
    batch = module.prepare(collate(rollouts(module), module.vocabulary), rows=4)
    totals = module.totals(batch)
    whole, measured = module(Work(totals, batch))
    parts = [module(Work(totals, part)) for _, part in batch.split(1)]
    torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
    torch.testing.assert_close(sum(values for _, values in parts), measured)


def test_entropy_and_kl_are_means_over_response_tokens_whatever_these_weigh(module):
    batch = module.prepare(collate(rollouts(module), module.vocabulary), rows=4)
    batch = replace(batch, old_BT=batch.old_BT - 0.5 * batch.mask_BT)  # every ratio is exp(0.5)
    _, values = module(Work(module.totals(batch), batch))
    measured, where = dict(zip(MEASURED, values.tolist(), strict=True)), batch.mask_BT.bool()
    with torch.no_grad():
        logits = module.model(input_ids=batch.tokens_BL, use_cache=False).logits[:, :-1]
    entropy = objectives.entropy(masked_log_softmax(logits, batch.states_BT, module.allowed_SV))[where].mean()
    assert module.weights(batch)[1] < where.sum()  # forced tokens weigh nothing here
    assert measured["entropy"] == pytest.approx(float(entropy), rel=1e-5)
    assert measured["approx_kl"] == pytest.approx(float(torch.tensor(0.5).exp()) - 1.5, rel=1e-4)


def test_in_mixed_precision_what_the_loss_is_told_is_not_rounded(module):
    fabric = Fabric(accelerator="cpu", precision="bf16-mixed")
    with fabric.autocast():
        batch = module.prepare(collate(rollouts(module), module.vocabulary), rows=4)
    assert batch.old_BT.min() < -2  # where bfloat16 has steps of 2 / 128
    batch = replace(batch, old_BT=batch.old_BT - 0.01 * batch.mask_BT)
    _, measured = fabric.setup_module(copy.deepcopy(module))(Work(module.totals(batch), batch))
    assert float(measured[3]) == pytest.approx(math.exp(0.01) - 1.01, rel=0.01)


def test_before_the_first_update_the_ratio_is_one(module):
    batch = module.prepare(collate(rollouts(module), module.vocabulary), rows=4)
    _, (_, clipped, entropy, moved) = module(Work(module.totals(batch), batch))
    assert clipped == 0 and abs(moved) < 1e-6 and entropy > 0
    torch.testing.assert_close(batch.old_BT, batch.reference_BT)
