"""The named options of RLModule: each acts, and does what its oracle does, on rollouts of trees."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.func import functional_call
from transformers import AutoConfig, AutoModelForCausalLM

import oracles
from rftt_lightning.core.contracts import Problem, Provenance, Rollout, Score, Segment, Status, Verdict
from rftt_lightning.policy import logprobs, objectives
from rftt_lightning.policy.vocab import load, masked_log_softmax
from rftt_lightning.training.rl import CHOICES, MEASURED, RLBatch, RLModule, Work, collate

BASE = "pkg:tiny/checkpoints/countdown"

# problem, nodes of the path (one a segment, of two tokens and of two more each), rewards of the segments
TREES = [
    ("a", (1, 2, 4), (0.1, 0.0, 1.0)),
    ("a", (1, 3), (0.1, -0.5)),
    ("a", (5, 6), (0.0, 0.3)),
    ("b", (1, 2), (0.0, 1.0)),
    ("b", (1, 4), (0.0, 0.5)),
    ("c", (7, 8), (0.0, 1.0)),
]
PATHS = [[(name, k) for k in nodes] for name, nodes, _ in TREES]
GROUPS = [0, 0, 0, 1, 1, 2]


def rollouts(module: RLModule) -> list[Rollout]:
    """Opening tokens are forced by UCT in first segments, by argmax in last ones; the sampler's log-probs are made up."""
    names, vocabulary, made = module.table.names, module.vocabulary, []
    word, chance = module.tokenizer.get_vocab()["7"], torch.Generator().manual_seed(0)
    for problem, nodes, rewards in TREES:
        segments = []
        for depth, node in enumerate(nodes):
            last = depth == len(nodes) - 1
            tag = names.index("output" if last else "next_step")
            tokens = (vocabulary.opens[tag], *[word] * (node % 3), vocabulary.closes[tag])
            logprobs = tuple((-3 * torch.rand(len(tokens), generator=chance)).tolist())
            chosen = Provenance.ARGMAX if last else Provenance.UCT if depth == 0 else Provenance.SAMPLED
            provenance = (int(chosen), *[0] * (len(tokens) - 1))
            segments.append(Segment(names[tag], tokens, logprobs, provenance, "", True))
        score = Score(Verdict(Status.RIGHT), 0.5, rewards)
        made.append(Rollout(Problem(problem, "q"), (4, 5), tuple(segments), True, nodes, score))
    return made


def learner() -> RLModule:
    module = RLModule(BASE)
    with torch.no_grad():  # so that there is a KL
        for parameter in module.reference.values():
            parameter.add_(0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    return module


@pytest.fixture(scope="module")
def module() -> RLModule:
    return learner()


@contextmanager
def options(module: RLModule, **changed) -> Iterator[RLModule]:
    before = dict(module.hparams)
    module.hparams.update(changed)
    yield module
    module.hparams.update(before)


def prepared(module: RLModule, **changed) -> RLBatch:
    with options(module, **changed):
        return module.prepare(collate(rollouts(module), module.vocabulary), rows=4)


def moved(batch: RLBatch) -> RLBatch:
    """As after an update that was not small."""
    away = 0.15 * torch.sin(batch.tokens_BL[:, 1:] + batch.mask_BT.cumsum(1))
    return replace(batch, old_BT=batch.old_BT - away * batch.mask_BT)


def loss(module: RLModule, batch: RLBatch, **changed) -> torch.Tensor:
    batch = moved(batch)
    with options(module, **changed), torch.no_grad():
        return module(Work(module.totals(batch), batch))[0]


def test_nodes_are_shared_in_a_tree_and_not_between_trees(module):
    batch = collate(rollouts(module), module.vocabulary)
    assert torch.equal(batch.node_BT >= 0, batch.mask_BT > 0)
    numbers: dict = {}
    for row, path in enumerate(PATHS):
        found = list(dict.fromkeys(batch.node_BT[row][batch.mask_BT[row] > 0].tolist()))
        assert len(found) == len(path)
        numbers.update(zip(path, found, strict=True))
    assert len(set(numbers.values())) == len(numbers) == len({node for path in PATHS for node in path})
    ends = objectives.segment_ends(batch.node_BT)
    assert ends.sum(1).tolist() == [len(path) for path in PATHS]
    assert ends[batch.rewards_BT != 0].all()


def test_outside_a_tree_no_segment_is_shared(module):
    batch = collate([replace(rollout, nodes=()) for rollout in rollouts(module)], module.vocabulary)
    assert int(batch.node_BT.max()) + 1 == sum(map(len, PATHS))


def test_log_probs_are_those_of_the_distribution_that_the_sampler_draws_from(module):
    """Also at another temperature; each position's logits speak of the token after it."""
    batch = collate(rollouts(module), module.vocabulary)
    with options(module, temperature=0.7), torch.no_grad():
        logp, entropy = module.log_probs(batch, module.reference)
        inputs = {"input_ids": batch.tokens_BL, "use_cache": False}
        logits = functional_call(module.model, module.reference, kwargs=inputs).logits
    for row, t in batch.mask_BT.nonzero().tolist():
        expected = masked_log_softmax(logits[row, t], batch.states_BT[row, t], module.allowed_SV, 0.7)
        assert float(logp[row, t]) == pytest.approx(float(expected[batch.tokens_BL[row, t + 1]]), abs=1e-4)
        chances = expected.exp()
        assert float(entropy[row, t]) == pytest.approx(
            float(-(chances * chances.clamp(min=1e-30).log()).sum()), abs=1e-4
        )
    assert logp[batch.mask_BT == 0].abs().max() == entropy[batch.mask_BT == 0].abs().max() == 0


def test_the_policys_loss_is_the_clipped_surrogate(module):
    batch = moved(prepared(module))
    with options(module, clip_low=0.05, clip_high=0.1), torch.no_grad():
        found, measured = module(Work(module.totals(batch), batch))
    logp, _ = module.log_probs(batch)
    terms = [x.tolist() for x in (logp.detach(), batch.old_BT, batch.advantage_BT, batch.mask_BT)]
    expected = oracles.ppo(*terms, float(batch.mask_BT.sum()), 0.05, 0.1)
    assert (float(found), float(measured[1])) == pytest.approx(expected, abs=1e-5) and expected[1] > 0.1


def test_what_lies_outside_the_response_is_nothing_to_the_advantages(module):
    batch = prepared(module)
    other = replace(batch, old_BT=torch.where(batch.mask_BT > 0, batch.old_BT, 9.0))
    for name in CHOICES["advantage"]:
        with options(module, advantage=name, kl_beta=0.3):
            assert torch.equal(module.advantages(other), module.advantages(batch))


@pytest.mark.parametrize("name", CHOICES["advantage"])
@pytest.mark.parametrize("gamma, per", [(1.0, "token"), (0.9, "token"), (0.9, "segment")])
@pytest.mark.parametrize("kl, beta, where", [("k1", 0.3, "reward"), ("k3", 0.5, "reward"), ("k2", 0.3, "loss")])
def test_advantages_are_the_named_ones_of_what_is_paid(module, name, gamma, per, kl, beta, where):
    batch = prepared(module, advantage=name, kl=kl, kl_beta=beta, kl_in=where, gamma=gamma, gamma_per=per)
    pairs = zip(batch.old_BT.flatten().tolist(), batch.reference_BT.flatten().tolist(), strict=True)
    penalty_BT = torch.tensor([beta * oracles.kl(*pair, kl) for pair in pairs]).view_as(batch.old_BT)
    penalty_BT = penalty_BT * (where == "reward")
    columns = batch.rewards_BT, penalty_BT, batch.mask_BT, batch.node_BT, torch.tensor(GROUPS)
    expected = objectives.advantages(name, *columns, gamma, per)
    torch.testing.assert_close(batch.advantage_BT, expected, rtol=1e-4, atol=1e-5)
    assert expected.abs().max() > 0.1


def test_plain_returns_of_right_answers_are_sft_on_them(module):
    """Rewards of 1 and 0 at the end and no KL: the gradient is that of the right rollouts' log-likelihood."""
    right = [True, False] * len(GROUPS)
    made = [
        replace(r, score=replace(r.score, rewards=(0.0,) * (len(r.segments) - 1) + (float(good),)))
        for r, good in zip(rollouts(module), right, strict=False)
    ]
    with options(module, advantage="return", kl_beta=0.0):
        batch = module.prepare(collate(made, module.vocabulary), rows=4)
        found, _ = module(Work(module.totals(batch), batch))
        gradient = torch.autograd.grad(found, list(module.model.parameters()))
    kept = batch.rows(torch.tensor([i for i in range(len(batch)) if right[i]]))
    likelihood = module.log_probs(kept)[0].sum() / batch.mask_BT.sum()
    for a, b in zip(gradient, torch.autograd.grad(-likelihood, list(module.model.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)


def test_a_kl_in_the_loss_is_not_in_the_reward_and_weighs_what_it_should(module):
    without = prepared(module, kl_beta=0.0)
    assert torch.equal(prepared(module, kl_beta=0.3, kl_in="loss").advantage_BT, without.advantage_BT)
    assert not torch.equal(prepared(module, kl_beta=0.3).advantage_BT, without.advantage_BT)
    weight, divisor = module.weights(without)
    logp, _ = module.log_probs(without)
    for kind in CHOICES["kl"]:
        more = loss(module, without, kl_in="loss", kl=kind, kl_beta=0.3) - loss(module, without, kl_beta=0.0)
        terms = [x.tolist() for x in (logp.detach(), without.reference_BT, weight)]
        assert float(more) == pytest.approx(0.3 * oracles.kl_loss(*terms, float(divisor), kind), rel=1e-4)


@pytest.mark.parametrize("kind, cap", [("truncated", 1.5), ("masked", 1.5)])
def test_importance_weighs_the_sampled_tokens_alone(module, kind, cap):
    """Nothing is clipped here, so the loss of each token is its ratio times its advantage."""
    batch = prepared(module)
    wide = {"clip_low": 1.0, "clip_high": 99.0}
    with options(module, importance=kind, importance_cap=cap, **wide), torch.no_grad():
        found, _ = module(Work(module.totals(batch), batch))
    total = 0.0
    for row, t in batch.mask_BT.nonzero().tolist():
        pair = float(batch.old_BT[row, t]), float(batch.behaviour_BT[row, t])
        sampled = batch.provenance_BT[row, t] == int(Provenance.SAMPLED)
        total -= float(batch.advantage_BT[row, t]) * (oracles.importance(*pair, kind, cap) if sampled else 1.0)
    assert float(found) == pytest.approx(total / float(batch.mask_BT.sum()), abs=1e-5)


def test_tokens_that_search_chose_weigh_what_is_said_of_their_kind(module):
    batch = prepared(module)
    of = {kind: (batch.provenance_BT == int(kind)) & (batch.mask_BT > 0) for kind in Provenance}
    assert [bool(where.any()) for where in of.values()] == [True, True, True, False]  # none in the question
    assert torch.equal(batch.provenance_BT == int(Provenance.PROMPT), batch.mask_BT == 0)
    for forced, argmax, expected in ((0.25, None, 0.25), (0.25, 0.5, 0.5), (1.0, 0.0, 0.0)):
        with options(module, forced_weight=forced, argmax_weight=argmax):
            weight, divisor = module.weights(batch)
        for kind, share in ((Provenance.SAMPLED, 1.0), (Provenance.UCT, forced), (Provenance.ARGMAX, expected)):
            assert (weight[of[kind]] == share).all()
        assert divisor == weight.sum() and weight[batch.mask_BT == 0].abs().max() == 0


def test_a_token_without_weight_has_no_gradient(module):
    """Gradients by the log-probs are those of sampled tokens alone once both kinds of forced ones weigh nothing."""
    batch = prepared(module)
    for options_, silent in (
        ({"forced_weight": 0.0, "argmax_weight": 1.0}, Provenance.UCT),
        ({"forced_weight": 1.0, "argmax_weight": 0.0}, Provenance.ARGMAX),
    ):
        other = replace(batch, advantage_BT=batch.advantage_BT + 5.0 * (batch.provenance_BT == int(silent)))
        assert loss(module, other, **options_) == loss(module, batch, **options_)
        assert loss(module, other) != loss(module, batch)


@pytest.mark.parametrize(
    "option",
    [
        {"kl_in": "loss"},
        {"kl_in": "loss", "kl": "k2"},
        {"aggregation": "sequence"},
        {"aggregation": "constant"},
        {"aggregation": "constant", "constant_length": 7},
        {"importance": "truncated"},
        {"importance": "truncated", "importance_cap": 1.1},
        {"importance": "masked"},
        {"forced_weight": 0.0},
        {"argmax_weight": 0.0},
        {"clip_low": 0.0},
        {"clip_high": 0.0},
    ],
)
def test_every_option_of_the_loss_changes_it(module, option):
    batch = prepared(module)
    assert abs(float(loss(module, batch, **option) - loss(module, batch))) > 1e-4


@pytest.mark.parametrize("how", CHOICES["aggregation"])
def test_micro_batches_and_a_row_with_nothing_to_learn_change_no_mean(module, how):
    batch = prepared(module)
    with options(module, aggregation=how, kl_in="loss", kl="k2"):
        totals = module.totals(batch)
        whole, measured = module(Work(totals, batch))
        found = [module(Work(totals, part)) for _, part in batch.split(2)]
        torch.testing.assert_close(sum(x for x, _ in found), whole)
        torch.testing.assert_close(sum(x for _, x in found), measured)
        muted = batch.rows(torch.tensor([0])).muted()
        longer = RLBatch(*(torch.cat(columns) for columns in zip(batch.columns(), muted.columns(), strict=True)))
        torch.testing.assert_close(module.totals(longer), totals)
        torch.testing.assert_close(module(Work(totals, longer)), (whole, measured))


@pytest.mark.parametrize("name", CHOICES["advantage"])
def test_rows_with_nothing_to_learn_are_defined(module, name):
    for made in (
        collate(rollouts(module), module.vocabulary).muted(),
        collate(rollouts(module)[:1], module.vocabulary),
    ):
        with options(module, advantage=name):
            batch = module.prepare(made, rows=4)
        assert torch.isfinite(batch.advantage_BT).all() and batch.advantage_BT[batch.mask_BT == 0].abs().max() == 0
        value, measured = module(Work(module.totals(batch).clamp(min=1), batch))
        value.backward()
        grads = [p.grad for p in module.model.parameters()]
        assert all(torch.isfinite(grad).all() for grad in grads) and torch.isfinite(measured).all()
        assert batch.mask_BT.any() or all(grad.abs().max() == 0 for grad in grads) and value == 0
        module.zero_grad()


def test_equal_rewards_teach_nothing(module):
    """Whatever is paid; 0.1 is the paper's for a wrong answer. The penalty for KL is another matter."""
    same = [
        replace(r, score=replace(r.score, rewards=(0.0,) * (len(r.segments) - 1) + (0.1,))) for r in rollouts(module)
    ]
    for name in CHOICES["advantage"][1:]:
        with options(module, advantage=name, kl_beta=0.0):
            batch = module.prepare(collate(same, module.vocabulary), rows=4)
        assert batch.advantage_BT.abs().max() == 0, name


def test_nothing_is_dropped_at_random(tmp_path):
    """GPT-2 as it is drops activations, and OPT whole layers, while they train: the ratio must begin at one all the same."""
    _, tokenizer = load(BASE)
    size = {
        "vocab_size": len(tokenizer),
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 128,
    }
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    for config in (
        AutoConfig.for_model("gpt2", n_embd=32, resid_pdrop=0.3, embd_pdrop=0.3, attn_pdrop=0.3, **size, **ids),
        AutoConfig.for_model("opt", hidden_size=32, word_embed_proj_dim=32, ffn_dim=64, layerdrop=0.5, **size, **ids),
    ):
        folder = tmp_path / config.model_type
        AutoModelForCausalLM.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        module = RLModule(str(folder))
        batch = module.prepare(collate(rollouts(module), module.vocabulary), rows=4)
        module.train()
        _, measured = module(Work(module.totals(batch), batch))
        assert measured[MEASURED.index("clip_fraction")] == 0 and measured[MEASURED.index("approx_kl")] < 1e-9
        names = [name for name in config.to_dict() if "drop" in name]
        assert all(getattr(module.model.config, name) == getattr(config, name) for name in names) and len(names) > 1


@pytest.mark.filterwarnings("error")
def test_a_kl_whose_gradient_is_nothing_is_warned_of():
    with pytest.raises(UserWarning, match="expected gradient of 0"):
        RLModule(BASE, kl="k1", kl_in="loss")


def steps(module: RLModule, made: list[Rollout], reduce: objectives.Reduce, forward, world: int) -> list[torch.Tensor]:  # type: ignore[no-untyped-def]
    """For every advantage, aggregation and KL: loss over all ranks, and the gradient."""
    found = []
    for (i, name), (j, how) in itertools.product(enumerate(CHOICES["advantage"]), enumerate(CHOICES["aggregation"])):
        changed = {
            "advantage": name,
            "aggregation": how,
            "kl": CHOICES["kl"][(i + j) % 3],
            "kl_in": CHOICES["kl_in"][(i + j) % 2],
            "importance": "truncated",
            "argmax_weight": 0.5,
        }
        with options(module, **changed):
            batch = moved(module.prepare(collate(made, module.vocabulary), rows=2, reduce=reduce))
            value, _ = forward(Work(reduce(module.totals(batch)), batch))
            (value * world).backward()
        found += [reduce(value.detach()), torch.cat([p.grad.flatten() for p in module.model.parameters()])]
        module.zero_grad()
    return found


def one_of_two(rank: int, folder: Path) -> None:
    """The first process has problem a, the second the others; logits of four tokens at a time."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    logprobs.written = partial(logprobs.written, at_once=4 * 144)
    module = learner()
    wrapped = torch.nn.parallel.DistributedDataParallel(module)

    def reduce(x: torch.Tensor) -> torch.Tensor:
        torch.distributed.all_reduce(x := x.clone())
        return x

    mine = [r for r in rollouts(module) if (r.problem.id == "a") == (rank == 0)]
    torch.save(steps(module, mine, reduce, wrapped, world=2), folder / f"{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_loss_and_the_gradient_of_one(module, tmp_path):
    torch.multiprocessing.spawn(one_of_two, (tmp_path,), nprocs=2)
    expected = steps(module, rollouts(module), lambda x: x, module, world=1)
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        for mine, alone in zip(found, expected, strict=True):
            tolerance = 1e-6 if alone.ndim == 0 else 1e-4 * float(alone.abs().max())  # losses, gradients
            torch.testing.assert_close(mine, alone, rtol=0, atol=tolerance)
    assert len({round(float(value), 6) for value in expected[::2]}) > 20  # they are not all the same
