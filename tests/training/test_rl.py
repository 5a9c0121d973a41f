"""RL on a tiny random model: what is learned from, and runs that repeat and resume bitwise."""

import json
from pathlib import Path

import pytest
import torch

from rftt_lightning.app.cli import main
from rftt_lightning.core.contracts import Problem, Provenance, Rollout, Score, Segment, Status, UserError, Verdict
from rftt_lightning.tiny.countdown import Countdown
from rftt_lightning.training.problems import ProblemDataModule
from rftt_lightning.training.rl import RLModule, collate, last_positions

CONFIG = str(Path(__file__).resolve().parents[2] / "configs/tiny/rl.yaml")
BASE = "pkg:tiny/checkpoints/countdown"


def fit(out: Path, *more: str) -> int:
    small = ["--data.train.init_args.count=40", "--data.validation.init_args.count=8", "--data.batch_size=4"]
    sizes = ["--trainer.max_steps=4", "--trainer.checkpoint_every=1", "--trainer.validate_every=2"]
    rollouts = ["--trainer.expander.init_args.rollouts=3", "--trainer.expander.init_args.max_tokens=48"]
    args = [
        "rl",
        "fit",
        f"--config={CONFIG}",
        f"--model.model={BASE}",
        f"--trainer.out={out}",
        *small,
        *sizes,
        *rollouts,
    ]
    return main([*args, *more])


def learned(out: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Metrics without times, and the final weights."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    timed = ("seconds", "share_rollout", "share_score", "share_update", "tokens_per_second")
    metrics = [{k: v for k, v in line.items() if k not in timed} for line in lines]
    newest = sorted((out / "checkpoints").glob("step-*.pt"))[-1]
    return metrics, torch.load(newest, weights_only=True)["model"]


def assert_same(one: Path, other: Path) -> None:
    (metrics, weights), (again, weights_again) = learned(one), learned(other)
    assert metrics == again and len(metrics) == 4
    assert all(torch.equal(weights[name], weights_again[name]) for name in weights)


def test_a_run_repeats_and_resumes_bitwise(tmp_path, capfd):
    assert fit(tmp_path / "straight") == 0
    assert fit(tmp_path / "again") == 0
    assert_same(tmp_path / "straight", tmp_path / "again")
    # a run that died after its second checkpoint, in the middle of writing metrics of the third step and another checkpoint
    dead = tmp_path / "again"
    (dead / "checkpoints" / "step-000004.pt").unlink()
    lines = (dead / "metrics.jsonl").read_text().splitlines()
    (dead / "metrics.jsonl").write_text("\n".join(lines[:3]) + '\n{"step": 3, "rew')
    (dead / "checkpoints" / "writing.tmp").write_bytes(b"half")
    assert fit(dead) == 0
    assert_same(tmp_path / "straight", dead)
    assert (tmp_path / "straight" / "hf" / "model.safetensors").exists()
    assert (tmp_path / "straight" / "config.yaml").exists()


def test_every_verdict_of_a_step_is_accounted_for(tmp_path, capfd):
    assert fit(tmp_path, "--trainer.max_steps=1") == 0
    (line,) = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert sum(line[f"verdicts/{status.value}"] for status in Status) == line["rollouts"] > 0
    assert line["share_rollout"] + line["share_score"] + line["share_update"] == pytest.approx(1.0)
    assert line["accuracy_low"] <= line["accuracy"] <= line["accuracy_high"]


@pytest.mark.parametrize(
    "option, word",
    [
        ("--trainer.nonsense=1", "nonsense"),
        ("--trainer.max_steps=0", "max_steps"),
        ("--model.advantage=best", "advantage"),
        ("--model.model=/nowhere", "nowhere"),
        ("--data.batch_size=1000", "batch_size"),
        ("--trainer.max_steps=three", "max_steps"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(tmp_path, capfd, option, word):
    assert fit(tmp_path, option) == 2
    error = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rftt:")]
    assert len(error) == 1 and word in error[0]


def test_train_and_validation_may_not_overlap():
    with pytest.raises(UserError, match="overlap"):
        ProblemDataModule(Countdown("train", count=5), Countdown("train", count=5), batch_size=2)


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
    assert last_positions(batch.mask_BT).tolist() == [len(r.prompt) + r.length - 2 for r in made]


def test_forced_tokens_weigh_what_the_setting_says(module):
    batch = collate(rollouts(module), module.vocabulary)
    forced = (batch.provenance_BT == int(Provenance.UCT)) & batch.mask_BT.bool()
    assert module.weights(batch)[forced].tolist() == [0.0] * 4
    assert module.weights(batch).sum() == batch.mask_BT.sum() - 4


def test_baseline_compares_with_the_problem_alone(module):
    """Equal rollouts of a problem have no advantage; of unequal ones the better has all positive, the worse all negative."""
    batch = module.prepare(collate(rollouts(module, step=0.0), module.vocabulary), rows=3)
    where = batch.mask_BT.bool()
    last = [batch.advantage_BT[row][where[row]][-1] for row in range(4)]
    assert last[0] > 0 > last[1] and abs(last[2]) < 1e-5 and abs(last[3]) < 1e-5


def test_loss_over_micro_batches_is_the_loss_of_the_batch(module):
    batch = module.prepare(collate(rollouts(module), module.vocabulary), rows=4)
    denominator = module.weights(batch).sum()
    whole, _ = module(denominator, *batch.columns())
    parts = sum(module(denominator, *part.columns())[0] for _, part in batch.split(1))
    torch.testing.assert_close(parts, whole)


def test_before_the_first_update_the_ratio_is_one(module):
    batch = module.prepare(collate(rollouts(module), module.vocabulary), rows=4)
    _, (_, clipped, entropy, moved) = module(module.weights(batch).sum(), *batch.columns())
    assert clipped == 0 and abs(moved) < 1e-6 and entropy > 0
    torch.testing.assert_close(batch.old_BT, batch.reference_BT)
