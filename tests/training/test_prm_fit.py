"""A PRM of our own: values, batches and loss against plain loops, and a world in which one word spoils a path."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rftt_lightning.core.contracts import Problem, ProblemSource, Score, Segment, Status, UserError, Verdict
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Plan, Tree
from rftt_lightning.policy.prm import StepClassifierPRM, functional_writer
from rftt_lightning.policy.vocab import load
from rftt_lightning.search.store import Store
from rftt_lightning.training.callbacks import ExportHF
from rftt_lightning.training.prm import (
    Held,
    PathBatches,
    PRMModule,
    ValueDataModule,
    ValuedPath,
    collate,
    mc_values,
    measure,
    valued_paths,
)
from sft_world import WORDS, Killed, save_base

TABLE = TokenTable.from_yaml()
BAD = "six"


class Spoilt(ProblemSource):
    """A step that says "six" is wrong; a path that does ends wrong."""

    def problems(self):
        return []

    def judge(self, problem, response):
        return Verdict(Status.WRONG if BAD in response else Status.RIGHT)

    def check_steps(self, problem, steps):
        return [None if tag == "output" else float(BAD not in text) for tag, text in steps]


def verdict_of(tree: Tree, leaf: int) -> Verdict:
    return Spoilt().judge(tree.problem, TABLE.render([s.step for s in tree.path_segments(leaf)]))


def grow(number: int, rollouts: int = 6, late: float = 0.0) -> Tree:
    """A random tree whose rollouts share prefixes; a share ``late`` of the verdicts timed out."""
    rng = random.Random(number)
    tree = Tree(Problem(f"t/{number}", " ".join(rng.choices(WORDS[:5], k=3))), (0,))
    for _ in range(rollouts):
        node = 0
        while True:
            last = len(tree.path(node)) >= 2 and rng.random() < 0.5
            open_ = [k for k in tree.children[node] if tree.ends[k] is None]
            if open_ and not last and rng.random() < 0.5:
                node = rng.choice(open_)
                continue
            tag = "output" if last else "next_step"
            (node,) = tree.plan(node, [Plan(tag, 1.0)])
            text = " ".join(rng.choices(WORDS, weights=(3, 3, 3, 3, 3, 2), k=2)) if not last else "one"
            tree.fill(node, Segment(tag, (1,), (0.0,), (0,), text, True))
            if last:
                break
        tree.end(node, complete=True)
        verdict = Verdict(Status.TIMED_OUT) if rng.random() < late else verdict_of(tree, node)
        tree.backup(node, Score(verdict, float(verdict.right), (0.0,) * len(tree.path(node)), ()))
    return tree


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("prm")
    store = Store(root / "trees", "trees", {})
    for number in range(80):
        tree = grow(number)
        store.add(tree.problem.id, tree.to_json())
    store.close()
    return SimpleNamespace(base=save_base(root / "base"), trees=str(root / "trees"), root=root)


@pytest.fixture(scope="module")
def module(world):
    module = PRMModule(world.base)
    module.configure_model()
    module.model.eval()
    return module


# -- values --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", range(20))
def test_values_are_means_over_the_rollouts_through_a_node(number):
    tree = grow(number, rollouts=12, late=0.2)
    soft, hard = mc_values(tree, "soft"), mc_values(tree, "hard")
    for node in range(len(tree)):
        outcomes = [
            float(rollout.score.verdict.right)
            for rollout in tree.rollouts()
            if (node in rollout.nodes or node == 0) and rollout.score.verdict.status is not Status.TIMED_OUT
        ]
        assert soft[node] == (pytest.approx(sum(outcomes) / len(outcomes)) if outcomes else None)
        assert hard[node] == (max(outcomes) if outcomes else None)


@pytest.mark.parametrize("least", [1, 2, 4])
def test_each_node_with_enough_visits_is_learned_from_once(least, module):
    writer = functional_writer(module.tokenizer, TABLE)
    closes = {module.tokenizer.get_vocab()[token.close] for token in TABLE.tokens}
    for number in range(20):
        tree = grow(number)
        paths = list(valued_paths(tree, writer, "soft", least, 1000, Spoilt()))
        learned = [v for path in paths for v in path.values if v is not None]
        expected = [v for k, v in enumerate(mc_values(tree, "soft")) if tree.visits[k] >= least]
        assert sorted(learned) == sorted(expected)
        assert sum(sum(path.new) for path in paths) == len(tree)
        for path, rollout in zip(paths, tree.rollouts(), strict=True):
            assert [path.tokens[end] in closes for end in path.ends] == [False] + [True] * len(rollout.steps)
            assert path.checks == tuple(Spoilt().check_steps(tree.problem, rollout.steps))
            assert path.right == rollout.score.verdict.right


def test_the_scorer_reads_the_very_ids_that_the_policy_wrote(module):
    """Where the contents spell no marks, text and back changes nothing."""
    ids = module.tokenizer.get_vocab()
    for number in range(10):
        tree = grow(number)
        turn = [{"role": "user", "content": tree.problem.question}]
        prompt = module.tokenizer.apply_chat_template(turn, add_generation_prompt=True, return_dict=False)
        for rollout in tree.rollouts():
            wrote = [
                i
                for tag, text in rollout.steps
                for i in (ids[f"<{tag}>"], *(ids[word] for word in text.split()), ids[f"</{tag}>"])
            ]
            written = functional_writer(module.tokenizer, TABLE)(tree.problem.question, rollout.steps)
            assert written.tokens == (*prompt, *wrote) and written.ends[0] == len(prompt) - 1


def test_how_a_path_ended_is_unknown_where_its_verdict_timed_out(module):
    writer, seen = functional_writer(module.tokenizer, TABLE), set()
    known = {Status.RIGHT: 1.0, Status.WRONG: 0.0, Status.TIMED_OUT: None}
    for tree in (grow(number, late=0.4) for number in range(5)):
        ended = [path.right for path in valued_paths(tree, writer, "soft", 1, 1000, None)]
        assert ended == [known[rollout.score.verdict.status] for rollout in tree.rollouts()]
        seen |= {*ended}
    assert seen == {*known.values()}


def test_paths_that_are_too_long_are_dropped(module):
    writer = functional_writer(module.tokenizer, TABLE)
    tree = grow(0)
    whole = list(valued_paths(tree, writer, "soft", 1, 1000, None))
    limit = sorted(len(path.tokens) for path in whole)[2]
    kept = list(valued_paths(tree, writer, "soft", 1, limit, None))
    assert [p is None for p in kept] == [len(p.tokens) > limit for p in whole] and None in kept


# -- batches -------------------------------------------------------------------------------------------------------------------


def some_paths(module, count: int = 10) -> list[ValuedPath]:
    writer = functional_writer(module.tokenizer, TABLE)
    return [p for n in range(count) for p in valued_paths(grow(n), writer, "soft", 1, 1000, Spoilt()) if p]


def test_batches_are_bounded_complete_and_shuffled(module):
    paths = some_paths(module)
    order = PathBatches(paths, 200, 0, seed=0, shuffle=True, rank=0, world=1)
    first, second = ([batch.paths for batch in order] for _ in range(2))
    assert first != second and sorted(map(id, sum(first, ()))) == sorted(map(id, paths)) and len(first) == len(order)
    assert sorted(map(id, sum(second, ()))) == sorted(map(id, paths))
    for batch in PathBatches(paths, 200, 0, seed=0, shuffle=False, rank=0, world=1):
        assert batch.tokens_BT.numel() <= 200 or len(batch.paths) == 1
    again = PathBatches(paths, 200, 0, seed=0, shuffle=True, rank=0, world=1)
    assert [batch.paths for batch in again] == first
    for done in (0, 3, len(order)):
        again.load_state_dict({**order.state_dict(), "epoch": 0, "done": done})
        assert [batch.paths for batch in again] == (first[done:] or second)
    ranks = [list(PathBatches(paths, 200, 0, 0, True, rank, 2)) for rank in range(2)]
    assert len(ranks[0]) == len(ranks[1]) == len(first) // 2
    assert not {id(p) for b in ranks[0] for p in b.paths} & {id(p) for b in ranks[1] for p in b.paths}


@pytest.mark.parametrize("count", [1, 2, 3, 100])
def test_in_validation_every_path_counts_once_and_ranks_take_as_many_steps(module, count):
    paths = some_paths(module)
    ranks = [list(PathBatches(paths, 200, 0, 0, False, rank, count)) for rank in range(count)]
    assert sorted(id(path) for rank in ranks for batch in rank for path in batch.paths) == sorted(map(id, paths))
    assert len({len(rank) for rank in ranks}) == 1 and all(len(batch.tokens_BT) for rank in ranks for batch in rank)


@torch.no_grad()
def test_the_loss_is_that_of_a_plain_loop(module):
    paths = some_paths(module, 3)
    total, count = 0.0, 0
    for path in paths:
        for end, value in zip(path.ends, path.values, strict=True):
            if value is not None:
                wrong, right = module.model(input_ids=torch.tensor([path.tokens[: end + 1]])).logits[0, -1].tolist()
                p = 1 / (1 + math.exp(wrong - right))
                total, count = total - value * math.log(p) - (1 - value) * math.log(1 - p), count + 1
    assert float(module.compute(collate(paths, 0), count)) == pytest.approx(total / count, abs=1e-5)
    parts = [collate(part, 0) for part in (paths[:1], paths[1:])]  # of two ranks, each with the mean number of values
    mean = sum(float(module.compute(part, count / 2)) for part in parts) / 2
    assert mean == pytest.approx(total / count, abs=1e-5)


def test_a_problem_is_in_one_part_only(world, module):
    data = ValueDataModule([world.trees], source=Spoilt(), val_fraction=0.3)
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)
    data.val_dataloader()

    def questions(part: str) -> set[tuple[int, ...]]:
        return {path.tokens[: path.ends[0] + 1] for path in data.paths[part]}

    trees = [grow(number) for number in range(80)]
    sizes = [len([p for p in data.paths[part] if p.new[0]]) for part in ("train", "validation")]
    assert sum(sizes) == 80 and 10 < sizes[1] < 40
    doubles = len(trees) - len({tree.problem.question for tree in trees})
    assert len(questions("train") & questions("validation")) <= doubles


def test_data_that_cannot_be_learned_from_are_refused(world, module, tmp_path):
    for settings, words in [
        ({"min_visits": 100}, "no value for train"),
        ({"max_length": 3}, "no value for train"),
        ({"trees": [str(tmp_path)]}, "is no store of trees|holds no trees|no value"),
    ]:
        data = ValueDataModule(**{"trees": [world.trees], **settings})
        data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1)
        with pytest.raises(UserError, match=words):
            data.train_dataloader()
    for settings in ({"min_visits": 0}, {"val_fraction": 0.0}, {"val_fraction": 1.0}, {"batch_tokens": 0}):
        with pytest.raises(UserError, match="data out of range"):
            ValueDataModule([world.trees], **settings)
    for settings in ({"lr": 0.0}, {"final_lr": 2.0}, {"warmup_steps": -1}, {"weight_decay": -1.0}):
        with pytest.raises(UserError, match="model out of range"):
            PRMModule(world.base, **settings)


# -- measures ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong, right", [((0.0,), (1.0,)), ((0.0, 0.4), (0.5, 1.0)), ((0.2,), (0.9,))])
def test_measures_are_those_of_plain_loops(wrong, right):
    """A domain's checker may give a step any score from 0 to 1."""
    rng = random.Random(0)
    held = []
    for _ in range(60):
        n = rng.randint(1, 5)
        tags = tuple(rng.choice(("verify", "next_step")) for _ in range(n))
        checks = tuple(rng.choice((*wrong, *right, None)) for _ in range(n))
        new = (True, *sorted(rng.random() < 0.7 for _ in range(n)))
        ended = rng.choice((0.0, 1.0, None))  # None: nothing is known of it
        path = ValuedPath((0,), (0,) * (n + 1), (None,) * (n + 1), new, tags, checks, ended)
        held.append(Held(path, tuple(rng.random() for _ in range(n + 1))))

    def auc(rows: list[tuple[float, float]]) -> float:
        pairs = [(a, b) for a, good in rows if good >= 0.5 for b, other in rows if other < 0.5]
        return sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)

    value, step, verify, first, ends = [], [], [], [], []
    for one in held:
        for i, check in enumerate(one.path.checks):
            ends += [(one.said[i + 1], one.path.right)] * (one.path.right is not None)
            if check is not None and one.path.new[i + 1]:
                kept = min(1.0, one.said[i + 1] / one.said[i])
                value.append((one.said[i + 1], check))
                step.append((kept, check))
                if one.path.tags[i] == "verify":
                    verify.append((kept, check))
                if not set(wrong) & set(one.path.checks[:i]):
                    first.append((one.said[i + 1], check))
    bins = [[(p, r) for p, r in ends if int(p * 10) == b] for b in range(10)]
    gaps = [abs(sum(p for p, _ in rows) - sum(r for _, r in rows)) for rows in bins]
    found = measure(held)
    assert found["auc_value"] == pytest.approx(auc(value), abs=1e-6)
    assert found["auc_step"] == pytest.approx(auc(step), abs=1e-6)
    assert found["auc_step/verify"] == pytest.approx(auc(verify), abs=1e-6)
    assert found["auc_value/first_error"] == pytest.approx(auc(first), abs=1e-6)
    assert found["auc_outcome"] == pytest.approx(auc(ends), abs=1e-6)
    assert found["ece"] == pytest.approx(sum(gaps) / len(ends), abs=1e-5)
    assert found["loss"] == pytest.approx(-sum(math.log(p if r else 1 - p) for p, r in ends) / len(ends), abs=1e-5)


def test_a_run_goes_on_bitwise_and_with_its_own_settings_alone(world, tmp_path):
    def fit(out, kill=-1, path=None, batch_tokens=512, **model):
        seed_everything(0)
        module = PRMModule(world.base, **{"lr": 1e-2, "warmup_steps": 5, **model})
        keep = ModelCheckpoint(tmp_path / out, "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=2,
            logger=False,
            callbacks=[Killed(kill), keep],
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
        )
        trainer.fit(module, ValueDataModule([world.trees], batch_tokens=batch_tokens), ckpt_path=path)
        return module.state_dict(), trainer.global_step

    straight, steps = fit("straight")
    half = steps // 2
    for saved in (3, half, half + 2):  # within an epoch, and at an epoch's end
        with pytest.raises(RuntimeError, match="killed"):
            fit(f"killed{saved}", saved + 1)
        path = tmp_path / f"killed{saved}" / f"step={saved}.ckpt"
        resumed, again = fit(f"resumed{saved}", path=path)
        assert again == steps and all(torch.equal(resumed[name], weight) for name, weight in straight.items()), saved
    for words, other in {
        "model.lr=0.01, now it is 0.5": {"lr": 0.5},
        "data.batch_tokens=512, now it is 600": {"batch_tokens": 600},
    }.items():
        with pytest.raises(UserError, match=words):
            fit("other", path=path, **other)


# -- the whole -------------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_it_learns_which_step_spoils_a_path_and_is_read_back_as_it_was(world, tmp_path):
    seed_everything(0)
    module = PRMModule(world.base, lr=1e-2, warmup_steps=5)
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=12,
        default_root_dir=tmp_path,
        logger=TensorBoardLogger(tmp_path, name="", version=""),
        callbacks=[ExportHF()],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=12,
        gradient_clip_val=1.0,
    )
    data = ValueDataModule([world.trees], source=Spoilt(), batch_tokens=512)
    trainer.fit(module, data)
    found = trainer.callback_metrics
    assert found["val/auc_step"] > 0.9 and found["val/auc_value/next_step"] > 0.8 and found["val/ece"] < 0.1
    assert (tmp_path / "calibration.png").stat().st_size > 1000
    assert "val/calibration" in EventAccumulator(str(tmp_path), size_guidance={"images": 0}).Reload().Tags()["images"]

    tree = grow(7)
    asked = [(tree.problem, rollout.steps) for rollout in tree.rollouts()]
    paths = [p for p in valued_paths(tree, functional_writer(module.tokenizer, TABLE), "soft", 1, 1000, None) if p]
    module.model.eval()
    with torch.no_grad():
        said = module.logits(collate(paths, 0)).softmax(-1)[..., 1]
    for row, path, scores in zip(said, paths, StepClassifierPRM(str(tmp_path / "hf")).score(None, asked), strict=True):
        assert scores == pytest.approx(row[list(path.ends[1:])].tolist(), abs=1e-5)
    head = load(world.base)[0]  # the base itself is as it was
    assert not any("score" in name for name, _ in head.named_parameters())
