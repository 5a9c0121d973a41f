"""Decoding in a batch that rows join and leave, with prefixes that are read once: nothing of that may show in what is written."""

import copy
import dataclasses
import math
import random
from itertools import islice

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    Gemma2Config,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from rftt_lightning.core.contracts import QUESTION, Finish, Message, Problem, Request, Sampling, UserError, collect
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Tree
from rftt_lightning.policy import decode
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.policy.vocab import add_functional_tokens, masked_log_softmax
from rftt_lightning.search.driver import Progress, grow
from rftt_lightning.search.expand import ChainOfThought, PromptExpander, TokenExpander
from rftt_lightning.tiny.model import build_tokenizer
from scripted import ScriptedReward, ScriptedSource

TABLE = TokenTable.from_yaml()
WORDS = ["what", "is", "number", "?", *(f"w{i}" for i in range(30))]
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 256}
MODELS = {
    "llama": LlamaConfig(**SMALL, intermediate_size=48, num_key_value_heads=4),
    "grouped heads": Qwen2Config(**SMALL, intermediate_size=48, num_key_value_heads=2),
    "qwen3": Qwen3Config(**SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=12),
    "sliding window": MistralConfig(**SMALL, intermediate_size=48, num_key_value_heads=2, sliding_window=7),
    "every other layer slides": Gemma2Config(
        **SMALL, intermediate_size=48, num_key_value_heads=2, head_dim=8, sliding_window=7
    ),
    "learned positions": GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256),
    "parallel layers": GPTNeoXConfig(**SMALL, intermediate_size=48),
    "alibi": BloomConfig(hidden_size=32, n_layer=2, n_head=4),
}


def lively(model, tokenizer) -> None:
    """An untrained model never closes a segment. Larger rows of the closing tags, and of the end of turn, win now and then."""
    with torch.no_grad():
        rows = [tokenizer.get_vocab()[tag] for tag in TABLE.tags if tag.startswith("</")] + [tokenizer.eos_token_id]
        weight = model.get_output_embeddings().weight
        weight *= 0.3 / weight.std()
        weight[rows] *= 3.0


def build(name: str = "llama"):
    tokenizer = build_tokenizer(WORDS, numbers=20)
    torch.manual_seed(0)
    config = copy.deepcopy(MODELS[name])
    config.vocab_size, config.tie_word_embeddings = len(tokenizer), False
    config.eos_token_id = config.bos_token_id = config.pad_token_id = None
    model = AutoModelForCausalLM.from_config(config).eval()
    add_functional_tokens(model, tokenizer, TABLE, init="random")
    lively(model, tokenizer)
    return model, tokenizer


@pytest.fixture(scope="module")
def world():
    return build()


@pytest.fixture(scope="module")
def prompts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for i, name in enumerate((*TABLE.names, "cot")):
        (folder / f"{name}.txt").write_text(" ".join(WORDS[i : i + 5]))
    return str(folder)


def backend(world, batch_size=16, cache_gb=0.1) -> HFBackend:
    return HFBackend.live(*world, TABLE, batch_size, cache_gb)


def kilobytes(made: HFBackend, positions: int) -> float:
    """GiB that hold so many positions."""
    config = made.model.config
    return positions * 2 * 4 * config.hidden_size * config.num_hidden_layers / 2**30


SAMPLED = Sampling(temperature=0.9, top_p=0.8, min_prior=0.05, max_segment_tokens=12)
GREEDY = Sampling(temperature=0.0, boundary="argmax", max_segment_tokens=12)
EXPANDERS = {
    "legal, greedy": lambda folder: TokenExpander(rollouts=4, sampling=GREEDY, max_tokens=60),
    "legal": lambda folder: TokenExpander(rollouts=4, sampling=SAMPLED, max_tokens=60),
    "drawn": lambda folder: TokenExpander(
        rollouts=4, sampling=SAMPLED, children="drawn", width=3, max_tokens=60, max_depth=5
    ),
    "puct": lambda folder: TokenExpander(rollouts=4, sampling=SAMPLED, rule="puct", max_tokens=60),
    "sample": lambda folder: TokenExpander(rollouts=4, sampling=SAMPLED, mode="sample", max_tokens=60),
    "prompts": lambda folder: PromptExpander(folder, rollouts=4, sampling=SAMPLED, final=None, max_tokens=60),
    "cot": lambda folder: ChainOfThought(folder, rollouts=3, sampling=SAMPLED, max_tokens=20),
}


def trees(made: HFBackend, expander, progress: Progress | None = None, **settings) -> dict[str, Tree]:
    source = ScriptedSource(5)
    reward = ScriptedReward(TABLE, value=lambda rollout, verdict: rollout.length % 7 / 7)
    grown = grow(source.problems(), expander, made, reward, source, progress=progress, **settings)
    found = {tree.problem.id: tree for _, tree in grown}
    for tree in found.values():
        tree.check()
    return found


def same(one: dict[str, Tree], other: dict[str, Tree]) -> None:
    """The same trees, but for the last digits of floating-point numbers."""
    assert one.keys() == other.keys()
    for a, b in zip((one[k] for k in one), (other[k] for k in one), strict=True):
        for name in ("parent", "children", "visits", "values", "ends", "spent", "prompt"):
            assert getattr(a, name) == getattr(b, name), name
        assert [plan.tag for plan in a.plans] == [plan.tag for plan in b.plans]
        assert [plan.prior for plan in a.plans] == pytest.approx([plan.prior for plan in b.plans], abs=1e-4)
        for s, t in zip(a.segments, b.segments, strict=True):
            assert (s is None) == (t is None)
            if s is not None:
                assert dataclasses.replace(s, logprobs=(), priors={}) == dataclasses.replace(t, logprobs=(), priors={})
                assert s.logprobs == pytest.approx(t.logprobs, abs=1e-4)
                assert dict(s.priors) == pytest.approx(dict(t.priors), abs=1e-4)


@pytest.mark.parametrize("name", EXPANDERS)
def test_neither_batch_nor_cache_nor_company_change_a_tree(world, prompts, name):
    expander = EXPANDERS[name](prompts)
    plain = trees(backend(world, 1, 0.0), expander, concurrency=1)
    assert sum(len(s.tokens) for tree in plain.values() for s in tree.segments if s) > 30  # there is something to see
    few = kilobytes(backend(world), 60)
    for batch_size, cache_gb, concurrency in ((5, 0.1, 4), (3, few, 7), (64, 0.0, 100)):
        made = backend(world, batch_size, cache_gb)
        same(trees(made, expander, concurrency=concurrency), plain)
        if cache_gb == few and name in ("legal", "drawn", "puct"):  # there was more than it could keep
            assert sum(len(s.tokens) for tree in plain.values() for s in tree.segments if s) > 60


@pytest.mark.parametrize("name", EXPANDERS)
def test_rollouts_under_way_together_are_repeatable(world, prompts, name):
    expander = EXPANDERS[name](prompts)
    plain = trees(backend(world, 1, 0.0), expander, parallel=3)
    same(trees(backend(world, 6, 0.1), expander, parallel=3, concurrency=3), plain)


def test_no_position_is_computed_twice(world):
    """All that the model read, counted as distinct prefixes."""
    made, progress = backend(world, 4), Progress()
    found = trees(made, TokenExpander(rollouts=8, sampling=SAMPLED, max_tokens=60), progress)
    read = set()
    for tree in found.values():
        for rollout in tree.rollouts():
            tokens = (*rollout.prompt, *(t for segment in rollout.segments for t in segment.tokens))
            read |= {tokens[:n] for n in range(1, len(tokens))}
            if rollout.segments[-1].priors:  # asked once more for what may follow
                read.add(tokens)
    assert progress.computed == len(read) <= progress.useful
    prompts = sum(len(tree.prompt) for tree in found.values())
    assert progress.useful == prompts + sum(len(s.tokens) for tree in found.values() for s in tree.segments if s)
    pool = made._prefixes.bytes
    assert pool < made.usage.cache_bytes and made.usage.position_bytes == 2 * 4 * 32 * 2
    assert made.usage.reused > 0 and made.usage.cache_bytes > 0
    without = Progress()
    trees(backend(world, 4, 0.0), TokenExpander(rollouts=8, sampling=SAMPLED, max_tokens=60), without)
    assert without.computed > 1.3 * progress.computed and without.useful == progress.useful


def test_the_same_prompt_is_read_once_for_many(world):
    made = backend(world, 16)
    prompt = made.chat([Message("user", "what is number 3 ?")])
    made.generate([Request(prompt, seed, 10, SAMPLED, after=QUESTION, segments=0) for seed in range(10)])
    assert made.usage.reused == 9 * (len(prompt) - 1)


@pytest.mark.parametrize("name", MODELS)
def test_any_model_with_a_standard_cache(name):
    """Log-probs of sampled trees are those of one forward pass over each path, without a cache."""
    model, tokenizer = build(name)
    made, sampling = backend((model, tokenizer), 5), Sampling(temperature=0.9, max_segment_tokens=12)
    found = trees(made, TokenExpander(rollouts=5, sampling=sampling, max_tokens=40), concurrency=4)
    assert made.usage.reused > 0
    rows = made.vocabulary
    for tree in found.values():
        for rollout in tree.rollouts():
            response = [t for segment in rollout.segments for t in segment.tokens]
            ids = torch.tensor([[*rollout.prompt, *response]])
            with torch.no_grad():
                logits = model(input_ids=ids, use_cache=False).logits[:, len(rollout.prompt) - 1 : -1]
            states = rows.states(ids[:, len(rollout.prompt) :])
            logp = masked_log_softmax(logits, states, rows.allowed_SV, sampling.temperature)[0]
            place, before = 0, None
            for segment in rollout.segments:
                stored = torch.tensor(segment.logprobs[1:])  # the first is of the distribution after pruning, or before
                chosen = torch.tensor(segment.tokens)[1:, None]
                exact = logp[place + 1 : place + len(segment.tokens)].gather(1, chosen)[:, 0]
                torch.testing.assert_close(stored, exact, atol=1e-3, rtol=0)
                if before is not None:
                    priors = dict.fromkeys(TABLE.names, 0.0) | dict(before.priors)
                    found_priors = logp[place, rows.opens].exp().tolist()
                    assert list(priors.values()) == pytest.approx(found_priors, abs=1e-3)
                place += len(segment.tokens)
                before = segment


def test_a_change_of_weights_is_noticed(world):
    """With and without the version raised: nothing that was read under the old weights is used."""
    model, tokenizer = build()
    made, expander = backend((model, tokenizer)), TokenExpander(rollouts=4, sampling=GREEDY, max_tokens=40)
    first = trees(made, expander)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))
    second = trees(made, expander)
    same(second, trees(backend((model, tokenizer), 1, 0.0), expander))
    assert any(first[k].segments != second[k].segments for k in first)


def by(make, **settings):
    def change(made: HFBackend) -> None:
        made.model(input_ids=torch.tensor([[1, 2, 3]])).logits.square().sum().backward()
        make(made.model.parameters(), lr=0.05, **settings).step()

    return change


def through_data(made: HFBackend) -> None:
    for weight in made.model.parameters():
        weight.data.add_(0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(1)))


def replaced(made: HFBackend) -> None:
    for weight in made.model.parameters():
        weight.data = weight.data * 1.3


CHANGES = {
    "sgd": by(torch.optim.SGD),
    "adamw": by(torch.optim.AdamW),
    "fused adamw": by(torch.optim.AdamW, fused=True),
    "through .data": through_data,
    "another .data": replaced,
    "loaded": lambda made: made.model.load_state_dict({k: 1.2 * v for k, v in made.model.state_dict().items()}),
    "another dtype": lambda made: made.model.to(torch.float64),
}


@pytest.mark.parametrize("name", CHANGES)
def test_no_change_of_the_weights_is_missed(name):
    """The version is not raised; what was read under the old weights must not be used all the same."""
    model, tokenizer = build()
    made, expander = backend((model, tokenizer)), TokenExpander(rollouts=3, sampling=GREEDY, max_tokens=30)
    first = trees(made, expander)
    CHANGES[name](made)
    second = trees(made, expander)
    same(second, trees(backend((model, tokenizer), 1, 0.0), expander))
    assert name == "another dtype" or any(first[k].segments != second[k].segments for k in first)


def test_autocast_is_another_model(world):
    made, expander = backend(world), TokenExpander(rollouts=3, sampling=GREEDY, max_tokens=30)
    for half in (False, True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            assert len(trees(made, expander)) == 5
    same(trees(made, expander), trees(backend(world, 1, 0.0), expander))


def draw_request(rng: random.Random, made: HFBackend, seen: list[tuple[int, ...]]) -> Request:
    """Any request that is allowed: nested and repeated prompts, caps of 1, forced and free, text and functional tokens."""
    prompt = made.chat([Message("user", f"what is number {rng.randrange(3)} ?")])
    if rng.random() < 0.3:
        prompt = prompt[: rng.randint(1, len(prompt))]
    elif rng.random() < 0.5 and seen:
        prompt = rng.choice(seen)
    elif rng.random() < 0.2:
        prompt = (prompt * 40)[: made.limit - rng.randint(1, 3)]
    sampling = Sampling(
        temperature=rng.choice([0.0, 0.7, 1.0]),
        top_p=rng.choice([1.0, 0.7]),
        boundary=rng.choice(["sample", "argmax"]),
        min_prior=rng.choice([0.0, 0.1]),
        max_segment_tokens=rng.choice([1, 2, 5, 30]),
    )
    common = {"seed": rng.choice([1, 2, 2**63 - 5]), "max_tokens": rng.choice([1, 2, 3, 10, 40]), "sampling": sampling}
    closes = dict(zip(made.vocabulary.closes, TABLE.names, strict=True))
    after = closes.get(prompt[-1], QUESTION)
    legal = TABLE.legal(after)
    if rng.random() < 0.3 or not legal:
        return Request(prompt, force="cot", **common)
    force = rng.choice([None, *legal])
    return Request(prompt, after=after, force=force, segments=rng.choice([0, 1, 2]), **common)


def dribble(requests: list[Request], rng: random.Random):
    """Gives fewer requests than there is room for, at times."""
    waiting = iter(requests)
    return lambda room: list(islice(waiting, rng.randint(1, room)))


@pytest.mark.parametrize("seed", range(25))
def test_any_mixture_of_requests_is_answered_as_each_alone(world, seed):
    """Twice over on one backend, so that the second time much is known, or was known and is given up."""
    rng = random.Random(seed)
    reference = backend(world, 1, 0.0)
    slots = rng.choice([0, 0.5, 1, 10, 40, 200, 10_000])
    made = backend(world, rng.choice([1, 2, 3, 7, 32]), kilobytes(reference, 1) * slots)
    seen: list[tuple[int, ...]] = []
    requests, alone = [], []
    for _ in range(rng.randint(1, 12)):
        requests.append(draw_request(rng, made, seen))
        alone += reference.generate(requests[-1:])
        path = requests[-1].prompt + tuple(t for segment in alone[-1].segments for t in segment.tokens)
        seen.append(path[: made.limit - 1])
    for _ in range(2):
        found = dict(pair for ready in made.stream(dribble(requests, rng)) for pair in ready)
        for number, expected in enumerate(alone):
            completion = found[number]
            assert completion.finish == expected.finish and len(completion.segments) == len(expected.segments)
            assert dict(completion.priors) == pytest.approx(dict(expected.priors), abs=1e-4)
            for s, t in zip(completion.segments, expected.segments, strict=True):
                assert dataclasses.replace(s, logprobs=(), priors={}) == dataclasses.replace(t, logprobs=(), priors={})
                assert s.logprobs == pytest.approx(t.logprobs, abs=1e-4)
                assert dict(s.priors) == pytest.approx(dict(t.priors), abs=1e-4)
        assert sum(c.computed for c in found.values()) > 0


@pytest.mark.parametrize("max_tokens", [6, 12, 17, 26])
def test_the_cache_does_not_stretch_a_budget(world, max_tokens):
    expander = TokenExpander(rollouts=4, sampling=SAMPLED, max_tokens=max_tokens)
    same(trees(backend(world), expander), trees(backend(world, 1, 0.0), expander))


@pytest.mark.parametrize("call", [1, 2, 5])
@pytest.mark.parametrize("place", ["copy", "reserve", "write"])
def test_a_backend_outlives_an_interrupt(world, monkeypatch, place, call):
    """Ctrl-C where keys and values are moved: what was noted and not yet written must not be believed."""
    made, expander = backend(world, 6), TokenExpander(rollouts=4, sampling=GREEDY, max_tokens=40)
    real, count = getattr(decode._Room, place), 0

    def breaks_off(self, *args, **settings):
        nonlocal count
        count += not args or place != "copy" or settings.get("back", False)
        if count == call:
            count += 1
            raise KeyboardInterrupt
        return real(self, *args, **settings)

    monkeypatch.setattr(decode._Room, place, breaks_off)
    with pytest.raises(KeyboardInterrupt):
        trees(made, expander)
    monkeypatch.undo()
    same(trees(made, expander), trees(backend(world, 1, 0.0), expander))


def test_a_stream_that_is_left_does_no_harm(world):
    made, expander = backend(world, 4), TokenExpander(rollouts=4, sampling=GREEDY, max_tokens=40)
    prompt = made.chat([Message("user", "what is number 3 ?")])
    waiting = iter([Request(prompt, seed, 20, SAMPLED, after=QUESTION, segments=0) for seed in range(30)])
    for _ in made.stream(lambda room: list(islice(waiting, room))):
        break
    same(trees(made, expander), trees(backend(world, 1, 0.0), expander))


def test_the_model_is_left_as_it_was_and_never_drops_out():
    """Dropout is off while decoding, and only then; a part that was frozen stays so."""
    model, tokenizer = build("learned positions")
    plain = trees(backend((model, tokenizer), 1, 0.0), TokenExpander(rollouts=3, sampling=GREEDY, max_tokens=30))
    model.train()
    model.transformer.h[0].eval()
    before = [module.training for module in model.modules()]
    made = backend((model, tokenizer), 4)
    same(trees(made, TokenExpander(rollouts=3, sampling=GREEDY, max_tokens=30)), plain)
    assert [module.training for module in model.modules()] == before
    prompt = made.chat([Message("user", "what is number 3 ?")])
    waiting = iter([Request(prompt, seed, 20, SAMPLED, after=QUESTION, segments=0) for seed in range(30)])
    for _ in made.stream(lambda room: list(islice(waiting, room))):
        assert [module.training for module in model.modules()] == before


def test_top_p_is_not_for_functional_tokens(world):
    made = backend(world)
    prompts = [made.chat([Message("user", f"what is number {i} ?")]) for i in range(40)]
    sampling = Sampling(temperature=1.0, top_p=0.2, max_segment_tokens=8)
    rare = 0
    for completion in made.generate(
        [Request(p, i, 30, sampling, after=QUESTION, segments=0) for i, p in enumerate(prompts)]
    ):
        priors = completion.priors
        for segment in completion.segments:
            assert segment.logprobs[0] == pytest.approx(math.log(priors[segment.tag]), abs=1e-4)
            rare += priors[segment.tag] < max(priors.values())
            priors = segment.priors
    assert rare > 5


def test_prompts_are_read_in_few_calls_and_with_little_padding(world):
    """One long prompt among short ones is read apart; one of each is read, however many ask it at once."""
    made = backend(world, 8)
    short = [made.chat([Message("user", f"{i} w1")]) for i in range(7)]
    long = made.chat([Message("user", " ".join(f"w{i % 30}" for i in range(100)))])
    requests = [Request(p, 0, 1, GREEDY, force="cot") for p in (*short, long)]
    computed = sum(c.computed for c in made.generate(requests))
    assert computed <= len({p[:n] for p in (*short, long) for n in range(1, len(p) + 1)}) + 2 * 8
    made.generate([Request(made.chat([Message("user", "w5 w6")]), 0, 1, GREEDY, force="cot")])
    again = made.chat([Message("user", "w7 w8 w9 w10")])
    before = copy.copy(made.usage)
    made.generate([Request(again, seed, 1, SAMPLED, force="cot") for seed in range(8)])
    assert made.usage.calls - before.calls == 2  # one reads, one decodes all of them
    assert made.usage.reused - before.reused >= 7 * (len(again) - 1)


def test_no_more_is_asked_for_than_there_is_room(world):
    made, asked = backend(world, 4), []
    prompt = made.chat([Message("user", "what is number 3 ?")])
    waiting = iter([Request(prompt, seed, 3, SAMPLED, force="cot") for seed in range(200)])

    def more(room: int) -> list[Request]:
        asked.append(list(islice(waiting, room)))
        return asked[-1]

    answered = 0
    for ready in made.stream(more):
        answered += len(ready)
        assert sum(map(len, asked)) <= answered + 3 * 4
    assert answered == 200


def test_what_cannot_be_asked_is_refused(world):
    made = backend(world)
    prompt = made.chat([Message("user", "what is number 3 ?")])
    close = made.vocabulary.closes[0]
    for bad in (
        Request(prompt, 0, 5, after=TABLE.names[0]),
        Request((*prompt, close), 0, 5, after=QUESTION),
        Request((*prompt, *[7] * made.limit), 0, 5, after=QUESTION),
        Request((), 0, 5, force="cot"),
    ):
        with pytest.raises(UserError):
            made.generate([Request(prompt, 0, 5, after=QUESTION), bad])
    assert made.generate([Request((*prompt, close), 0, 5, after=TABLE.names[0])])[0].segments


def test_models_without_keys_and_values_are_refused(world):
    config = MambaConfig(hidden_size=16, num_hidden_layers=1, vocab_size=len(world[1]))
    with pytest.raises(UserError, match="standard cache"):
        backend((AutoModelForCausalLM.from_config(config), world[1]))


def test_weights_must_not_change_under_a_request():
    model, tokenizer = build()
    made = backend((model, tokenizer), 2)
    prompt = made.chat([Message("user", "what is number 3 ?")])
    requests = iter([Request(prompt, seed, 20, SAMPLED, after=QUESTION, segments=0) for seed in range(9)])
    with pytest.raises(RuntimeError, match="weights changed"):
        for _ in made.stream(lambda room: list(islice(requests, room))):
            with torch.no_grad():
                model.get_input_embeddings().weight.mul_(1.01)


def test_why_a_completion_ended(world):
    made = backend(world)
    prompt = made.chat([Message("user", "what is number 3 ?")])

    def finishes(**settings) -> set[Finish]:
        sampling = Sampling(max_segment_tokens=settings.pop("cap", 200))
        requests = [
            Request(prompt, seed, **{"max_tokens": 200, "sampling": sampling, **settings}) for seed in range(12)
        ]
        found = collect(made, requests)
        for completion in found:
            last, written = completion.segments[-1], sum(len(s.tokens) for s in completion.segments)
            whole = last.closed and (settings.get("after") is None or TABLE.terminal(last.tag))
            if completion.finish is Finish.LENGTH:
                assert written == settings.get("max_tokens", 200)
            elif completion.finish is Finish.SEGMENT:
                assert not last.closed and len(last.tokens) == sampling.max_segment_tokens
            elif completion.finish is Finish.CONTEXT:
                assert len(prompt) + written == made.limit
            else:
                assert whole or len(completion.segments) == settings.get("segments", 1)
        return {completion.finish for completion in found}

    assert finishes(after=QUESTION, segments=1) == {Finish.STOP}
    assert finishes(after=QUESTION, segments=0, max_tokens=5) == {Finish.LENGTH}
    assert Finish.SEGMENT in finishes(after=QUESTION, segments=0, cap=4)
    assert finishes(force="cot", max_tokens=3) <= {Finish.LENGTH, Finish.STOP}
    assert Finish.STOP in finishes(force="cot")
    long = Problem("long", " ".join(["w1"] * 1000))
    made.limit, limit = len(prompt) + 6, made.limit
    assert Finish.CONTEXT in finishes(after=QUESTION, segments=0)
    made.limit = limit
    assert len(made.chat([Message("user", long.question)])) > 900


def test_the_batch_stays_full(world):
    """Twenty times as many requests as rows, of very different lengths: rows that end make room at once."""
    made = backend(world, 8)
    prompts = [made.chat([Message("user", f"what is number {i} ?")]) for i in range(160)]
    waiting = [Request(p, i, 2 + i % 40, SAMPLED, force="cot") for i, p in enumerate(prompts)]
    made.generate(waiting)
    assert made.usage.rows / made.usage.steps > 0.85 * 8


def test_memory_is_given_back(world):
    made = backend(world)
    trees(made, TokenExpander(rollouts=3, sampling=SAMPLED, max_tokens=40))
    assert made._prefixes.bytes > 0
    made.release()
    assert made._prefixes.bytes == 0 and made._prefixes.keys_YHND is None
    trees(made, TokenExpander(rollouts=3, sampling=SAMPLED, max_tokens=40))


def test_half_precision(world):
    model, tokenizer = build()
    made = backend((model.to(torch.bfloat16), tokenizer))
    assert len(trees(made, TokenExpander(rollouts=3, sampling=SAMPLED, max_tokens=40))) == 5
    assert made._prefixes.keys_YHND.dtype == torch.bfloat16


@pytest.mark.parametrize("spare", [0, 1])
def test_a_prompt_that_fills_the_context_gets_no_token(world, spare):
    made = backend(world)
    prompt = (made.chat([Message("user", "what is number 3 ?")]) * 100)[: made.limit - spare]
    if spare:
        (completion,) = made.generate([Request(prompt, 0, 5, force="cot")])
    else:
        with pytest.warns(UserWarning, match="fills the model's"):
            (completion,) = made.generate([Request(prompt, 0, 5, force="cot")])
    assert completion.finish is Finish.CONTEXT and len(completion.segments[0].tokens) == spare
