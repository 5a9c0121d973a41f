import json
import random
import sys
import weakref
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AddedToken

from rftt_lightning.core.contracts import Message, Problem, Step, Trajectory, UserError
from rftt_lightning.core.tokens import TextToken, TokenTable
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.policy.vocab import add_functional_tokens
from rftt_lightning.search.problems import JsonlProblems
from rftt_lightning.search.store import read_trajectories
from rftt_lightning.tiny.model import build_tokenizer
from rftt_lightning.training.data import (
    Batches,
    Encoder,
    Example,
    TreeDataModule,
    collate,
    encode_all,
    share_of,
)
from rftt_lightning.training.sft import SFTModule
from sft_world import TABLE, WORDS, build, trajectories, write_store

PATH = Trajectory(
    Problem("p/0", "one two"),
    (Step("next_step", "three four"), Step("verify", "two"), Step("refine", "four"), Step("output", "five")),
    (False, True, True, True),
    "merged",
)


@pytest.fixture(scope="module")
def tokenizer():
    tokenizer = build_tokenizer(WORDS)
    add_functional_tokens(build(tokenizer), tokenizer, TABLE)
    return tokenizer


def test_ids_are_prompt_steps_and_end_of_turn_with_loss_where_it_belongs(tokenizer):
    example = Encoder(tokenizer, TABLE)(PATH)
    said = tokenizer.convert_ids_to_tokens(list(example.tokens))
    assert said == [
        *("<|user|>", "one", "two", "<|end|>", "<|assistant|>"),
        *("<next_step>", "three", "four", "</next_step>", "<verify>", "two", "</verify>"),
        *("<refine>", "four", "</refine>", "<output>", "five", "</output>", "<|end|>"),
    ]
    assert example.loss == (False,) * 9 + (True,) * 10  # neither prompt nor the excluded wrong step
    assert [t for t, f in zip(said, example.functional, strict=True) if f] == [
        t for t in said if t.strip("</>") in TABLE.names
    ]


def test_what_cannot_be_learned_is_counted(tokenizer):
    tricky = Trajectory(PATH.problem, (Step("output", "one <verify> two"),), (True,), "plain")
    kept, counts = encode_all([PATH, tricky, PATH], Encoder(tokenizer, TABLE), 19)
    assert (len(kept), dict(counts)) == (2, {"kept": 2, "too_long": 0, "tag_in_text": 1})
    _, counts = encode_all([PATH, tricky, PATH], Encoder(tokenizer, TABLE), 18)
    assert dict(counts) == {"kept": 0, "too_long": 2, "tag_in_text": 1}


@pytest.mark.parametrize("table", [TABLE, TokenTable((TextToken("output", "", text=("five", "six")),), {}, {})])
def test_special_tokens_in_the_text_of_a_step_are_not_learned(table):
    """Those that only their entry marks, too, as most of Llama 3's."""
    tokenizer = build_tokenizer(WORDS)
    tokenizer.add_tokens([AddedToken("<|marked|>", special=True)])
    assert tokenizer.convert_tokens_to_ids("<|marked|>") not in tokenizer.all_special_ids
    add_functional_tokens(build(tokenizer), tokenizer, table)
    encoder = Encoder(tokenizer, table)
    for text, learned in {
        "two": True,
        "two <|end|>": False,
        "<|user|> two": False,
        "two <|marked|> three": False,
    }.items():
        example = encoder(Trajectory(PATH.problem, (Step("output", text),), (True,), "plain"))
        assert (example is not None) == learned, text


def test_prompts_are_those_of_the_backend_and_the_same_on_every_day():
    """With a template that prints the date as Llama 3.2's does."""
    tokenizer = build_tokenizer([*WORDS, "26", "Jul", "2024"])
    add_functional_tokens(build(tokenizer), tokenizer, TABLE)
    today = "{% if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}{{ date_string }} "
    tokenizer.chat_template = today + tokenizer.chat_template
    prompt = HFBackend.live(build(tokenizer), tokenizer, TABLE).chat([Message("user", PATH.problem.question)])
    assert tokenizer.convert_ids_to_tokens(prompt[:4]) == ["26", "Jul", "2024", "<|user|>"]
    assert Encoder(tokenizer, TABLE)(PATH).tokens[: len(prompt)] == prompt


def test_tokenizer_without_functional_tokens_is_refused():
    with pytest.raises(UserError, match="no functional token <clarify>"):
        Encoder(build_tokenizer(WORDS), TABLE)


def example(length, value=3):
    return Example((value,) * length, (False,) + (True,) * (length - 1), (False,) * length)


def test_compact_examples_are_the_examples(tokenizer):
    encoder, paths = Encoder(tokenizer, TABLE), [PATH, *trajectories(20)]
    plain = [encoder(path) for path in paths]
    compact, _ = encode_all(iter(paths), encoder, 512)
    assert len(compact) == 21 and list(compact) == plain and compact[-1] == plain[-1]
    assert {type(flag) for e in compact for flag in (*e.loss, *e.functional)} == {bool}
    for settings in ({}, {"max_tokens": 60}, {"max_tokens": 60, "packed": True}, {"shuffle": False}):
        one, other = (Batches(examples, 4, seed=1, rank=1, world=2, **settings) for examples in (plain, compact))
        for a, b in zip(one, other, strict=True):
            assert all(torch.equal(getattr(a, n), getattr(b, n)) for n in ("tokens_BT", "positions_BT", "loss_BT"))
            assert torch.equal(a.functional_BT, b.functional_BT) and a.denominator == b.denominator


def test_trajectories_are_held_one_at_a_time_and_a_token_takes_few_bytes(tmp_path, tokenizer, monkeypatch):
    seen, most = [], []

    def counted(folder):
        for trajectory in read_trajectories(folder):
            seen.append(weakref.ref(trajectory))
            most.append(sum(each() is not None for each in seen))
            yield trajectory

    data = TreeDataModule(write_store(tmp_path, [PATH] * 500))
    data.trainer = SimpleNamespace(
        lightning_module=SimpleNamespace(tokenizer=tokenizer, table=TABLE),
        global_rank=0,
        world_size=1,
        accumulate_grad_batches=1,
    )
    monkeypatch.setattr("rftt_lightning.training.data.read_trajectories", counted)
    data.setup("fit")
    examples = data.train_dataloader().examples
    assert data.val_dataloader() == [] and len(examples) == 500 and max(most) <= 3
    assert sum(map(sys.getsizeof, vars(examples).values())) < 7.5 * 500 * 19


def test_collate_pads_and_packs():
    padded = collate([example(3), example(5)], packed=False, pad=0, denominator=6)
    assert padded.tokens_BT.tolist() == [[3, 3, 3, 0, 0], [3] * 5]
    assert padded.loss_BT.tolist() == [[False, True, True, False, False], [False, True, True, True, True]]
    assert padded.positions_BT.tolist() == [[0, 1, 2, 3, 4]] * 2
    packed = collate([example(3), example(5)], packed=True, pad=0, denominator=6)
    assert packed.tokens_BT.tolist() == [[3] * 8]
    assert packed.positions_BT.tolist() == [[0, 1, 2, 0, 1, 2, 3, 4]]
    assert packed.loss_BT.sum() == padded.loss_BT.sum() == 6
    assert packed.to("cpu").tokens_BT.tolist() == packed.tokens_BT.tolist()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["qwen2", "llama"])
def test_packed_equals_padded_in_loss_and_gradients(tokenizer, family, attention):
    model = build(tokenizer, family, attention)
    assert (model.config.model_type, model.config._attn_implementation) == (family, attention)
    module = SFTModule("unused")
    module.model = model.train()
    examples, _ = encode_all(trajectories(6), Encoder(tokenizer, TABLE), 512)
    alone = [module.compute(collate([e], False, 0, 1)).nll.item() for e in examples]
    outcomes, gradients = [], []
    for packed in (False, True):
        model.zero_grad()
        outcome = module.compute(collate(examples, packed, 0, 1))
        outcome.nll.backward()
        outcomes.append(outcome)
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert outcomes[0].nll.item() == pytest.approx(sum(alone), rel=1e-5)
    assert outcomes[1].nll.item() == pytest.approx(sum(alone), rel=1e-5)
    for name in ("tokens", "right", "functional", "functional_right"):
        assert getattr(outcomes[0], name) == getattr(outcomes[1], name)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)


def many(seed=0):
    rng = random.Random(seed)
    return [example(rng.randint(2, 12), value) for value in range(3, 40)]


@pytest.mark.parametrize("settings", [{}, {"max_tokens": 30}, {"max_tokens": 30, "packed": True}])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_every_example_is_learned_once_an_epoch_by_all_ranks_together(settings, world):
    ranks = [Batches(many(), 4, seed=1, rank=r, world=world, accumulate=2, **settings) for r in range(world)]
    for _ in range(2):
        epoch = [list(batches) for batches in ranks]
        assert len({len(batches) for batches in epoch}) == 1
        assert all(len(batches) == len(ranks[0]) for batches in epoch)
        learned = [t for rank in epoch for b in rank for t in b.tokens_BT[b.loss_BT].tolist()]
        assert sorted(learned) == sorted(t for e in many() for t, m in zip(e.tokens, e.loss, strict=True) if m)
        for i in range(0, len(epoch[0]), 2):
            step = [b for rank in epoch for b in rank[i : i + 2]]
            assert {b.denominator for b in step} == {sum(b.loss_BT.sum().item() for b in step)}
        if "max_tokens" in settings:
            assert all(b.tokens_BT.numel() <= 30 for rank in epoch for b in rank)


def tokens(batches):
    return [b.tokens_BT.tolist() for b in batches]


def test_order_hangs_on_seed_and_epoch_alone_and_resumes_anywhere():
    straight = Batches(many(), 4, seed=1)
    epochs = [tokens(straight) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert tokens(Batches(many(), 4, seed=2)) != epochs[0]
    for done in (0, 1, 7, len(straight)):
        resumed = Batches(many(), 4, seed=1)
        resumed.load_state_dict({**straight.state_dict(), "epoch": 1, "done": done})
        rest = tokens(resumed)
        assert rest == (epochs[1][done:] or epochs[2])
    for other in (Batches(many(), 5, seed=1), Batches(many(), 4, seed=2), Batches(many(), 4, seed=1, max_tokens=90)):
        with pytest.raises(UserError, match="same data"):
            other.load_state_dict(straight.state_dict())


def test_validation_is_whole_each_time():
    order = Batches(many(), 4, shuffle=False)
    whole = tokens(order)
    next(iter(order))  # what a sanity check reads
    assert tokens(order) == whole and len(whole) == len(order)


def test_an_order_goes_on_with_the_same_examples_alone(tokenizer):
    def order(paths):
        return Batches(encode_all(paths, Encoder(tokenizer, TABLE), 512)[0], 4)

    paths = trajectories(20)
    changed = [*paths[:-1], replace(paths[-1], train=(False,) * len(paths[-1].train))]  # as long, other loss
    state = order(paths).state_dict()
    order(paths).load_state_dict(state)
    for others in (changed, paths[::-1]):
        with pytest.raises(UserError, match="same data"):
            order(others).load_state_dict(state)


def test_accumulated_batches_are_the_same_examples():
    whole = list(Batches(many(), 8, seed=1))
    parts = list(Batches(many(), 2, seed=1, accumulate=4))
    for i, batch in enumerate(whole):
        step = parts[4 * i : 4 * i + 4]
        assert sorted(batch.tokens_BT[batch.loss_BT].tolist()) == sorted(
            t for b in step for t in b.tokens_BT[b.loss_BT].tolist()
        )
        assert {b.denominator for b in step} == {batch.denominator}


def test_split_is_by_problem_and_stable(tmp_path):
    write_store(tmp_path, trajectories(60) + trajectories(60))
    data = TreeDataModule(str(tmp_path), val_fraction=0.25)
    data.setup("fit")
    train, held = ({t.problem.id for t in part} for part in (data.train, data.validation))
    assert not train & held
    assert len(train | held) == 60
    assert all(share_of(name) < 0.25 for name in held)
    assert 5 < len(held) < 25


def test_mistakes_in_the_data(tmp_path):
    with pytest.raises(UserError, match="no store of trajectories"):
        TreeDataModule(str(tmp_path / "nowhere")).setup("fit")
    with pytest.raises(UserError, match="holds no trajectories"):
        TreeDataModule(write_store(tmp_path, [])).setup("fit")
    with pytest.raises(UserError, match="data out of range"):
        TreeDataModule(str(tmp_path), batch_size=0)


def test_held_out_problems_are_not_trained_on_unless_it_is_allowed(tmp_path):
    folder, paths = write_store(tmp_path / "store", trajectories(5)), trajectories(6)
    for name, path in (("dirty", paths[4]), ("clean", paths[5])):
        row = {"question": path.problem.question, "answer": "one"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    clean, dirty = (JsonlProblems(str(tmp_path / f"{name}.jsonl")) for name in ("clean", "dirty"))
    TreeDataModule(folder, held_out=[clean]).setup("fit")
    with pytest.raises(UserError, match="1 identical"):
        TreeDataModule(folder, held_out=[clean, dirty]).setup("fit")
    TreeDataModule(folder, held_out=[clean, dirty], allow_overlap=True).setup("fit")
