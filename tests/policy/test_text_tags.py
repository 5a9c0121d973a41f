"""Tags as ordinary text: what is learned is read back, what is no path is told apart, and training sees what was sampled."""

import math
import random

import pytest
import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rftt_lightning.core.contracts import (
    QUESTION,
    Completion,
    Problem,
    ProblemSource,
    Request,
    Sampling,
    Score,
    Status,
    Step,
    Trajectory,
    UserError,
    Verdict,
)
from rftt_lightning.core.tokens import DEFAULT_TABLE, TokenTable
from rftt_lightning.policy.decode import Row
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.policy.tokenized import read_table
from rftt_lightning.policy.vocab import add_functional_tokens, text_tags
from rftt_lightning.search.expand import TokenExpander, seed_of
from rftt_lightning.tiny.model import build_tokenizer
from rftt_lightning.training.callbacks import log_use
from rftt_lightning.training.data import Encoder
from rftt_lightning.training.measures import count
from rftt_lightning.training.pictures import path as figure
from rftt_lightning.training.rl import RLModule, collate
from sft_world import build

WORDS = ("one", "two", "three", "check", "step", "next", "end", "answer", "plan")
TAGS = {  # of several words, some of which are contents, too
    "next_step": ["next step", "end step"],
    "verify": ["check", "end check"],
    "output": ["answer", "end answer"],
}


def write_table(folder, tags=TAGS):
    """The paper's table with tags that are text."""
    table = yaml.safe_load(DEFAULT_TABLE.read_text())
    for token in table["tokens"]:
        token["text"] = tags.get(token["name"], [f"plan {token['name'][:1]}", "end plan"])
    path = folder / "tokens.yaml"
    path.write_text(yaml.safe_dump(table))
    return str(path)


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_table(tmp_path_factory.mktemp("table"))


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer([*WORDS, "c", "a", "s", "d", "r"])


@pytest.fixture(scope="module")
def backend(path, tokenizer):
    return HFBackend.live(build(tokenizer), tokenizer, TokenTable.from_yaml(path))


def read(backend, tokens, logprobs, end=None, segments=0):
    """The segments of a rollout in which these tokens were written, and the priors before them."""
    return backend._read(Request((1,), 0, 9, segments=segments), Row(list(tokens), list(logprobs), end=end))


def split(backend, text):
    """Segments of a rollout, as (tag, text, closed)."""
    ids = backend.tokenizer(text, add_special_tokens=False)["input_ids"]
    segments, priors = read(backend, ids, [-0.5] * len(ids))
    assert [token for segment in segments for token in segment.tokens] == ids  # nothing is lost, nothing twice
    assert all(len(s.tokens) == len(s.logprobs) == len(s.provenance) for s in segments)
    assert [s.priors for s in (*segments[-1:],)] == [{}] and list(priors) == [segments[0].tag]
    return [(segment.tag, segment.text, segment.closed) for segment in segments]


def test_an_answer_that_is_no_path_at_all_is_a_rollout(path, backend):
    """Ended at once, or without a tag: it is recorded, worth nothing, and a batch of it has nothing but what was written."""
    expander, vocabulary = TokenExpander(path, mode="sample"), backend.vocabulary
    for text in ("", "one two"):
        ids = backend.tokenizer(text, add_special_tokens=False)["input_ids"]
        tree = expander.plant(Problem("p", "one two"), backend)
        segments, priors = read(backend, ids, [-0.5] * len(ids))
        node, more = expander.tell(tree, 0, Completion(segments, priors), seed=0)
        tree.backup(node, Score(Verdict(Status.NO_ANSWER), 0.0, (0.0,)))
        (rollout,) = tree.rollouts()
        assert more is None and not rollout.complete and rollout.length == len(ids)
        batch = collate([rollout], vocabulary)
        assert batch.mask_BT.sum() == len(ids) and not batch.states_BT.any()
        used = count([tree], backend.tokens, Spelled())
        assert (
            used["rollouts"] == 1
            and used["unclosed"] == 1
            and not any(v for k, v in used.items() if k.startswith("used/"))
        )
        figure(rollout, backend.tokens)
        events = Written()
        log_use(events, "samples", [rollout.steps], backend.tokens, 0)
        assert events.calls == 0


class Written:
    """Counts what a TensorBoard writer is given."""

    calls = 0

    def add_scalar(self, *args):
        self.calls += 1

    add_histogram = add_scalar


class Spelled(ProblemSource):
    def problems(self):
        return []

    def judge(self, problem, response):
        return Verdict(Status.NO_ANSWER)


def test_a_path_is_as_deep_as_was_asked_for(backend):
    ids = backend.tokenizer("next step one end step " * 3, add_special_tokens=False)["input_ids"]
    segments, _ = read(backend, ids, [0.0] * len(ids), segments=2)
    assert [segment.closed for segment in segments] == [True, True]  # what is written after that is not the path's


@pytest.mark.parametrize(
    "text, found",
    [
        (
            "next step one two end step check one end check answer two end answer",
            [("next_step", "one two", True), ("verify", "one", True), ("output", "two", True)],
        ),
        ("next step end step", [("next_step", "", True)]),
        ("next step end end step", [("next_step", "end", True)]),  # half a tag is content
        ("next step answer one end step", [("next_step", "answer one", True)]),  # so is another's
        ("next step one end check", [("next_step", "one end check", False)]),  # cut
        ("next step one", [("next_step", "one", False)]),
        ("one next step two end step", [("", "one next step two end step", False)]),  # no tag at the beginning
        ("next step one end step two", [("next_step", "one", True), ("", "two", False)]),  # nor after a segment
        ("check one end check", [("", "check one end check", False)]),  # the grammar begins no path so
        (
            "next step one end step answer two end answer answer two end answer",  # nor goes on after its end
            [("next_step", "one", True), ("output", "two", True), ("", "answer two end answer", False)],
        ),
        ("", [("", "", False)]),
    ],
)
def test_segments_are_found_as_the_grammar_has_them(backend, text, found):
    assert split(backend, text) == found


@pytest.mark.parametrize(
    "text, sizes, complete",
    [
        ("next step one end step answer two end answer", [5, 5], True),  # the end of turn is the last segment's
        ("next step one end step", [5, 1], False),  # one that comes too early stands for itself
        ("next step one", [4], False),
        ("", [1], False),
        ("answer two end answer answer", [0], False),
    ],
)
def test_the_end_of_turn_is_a_token_of_the_path(backend, text, sizes, complete):
    ids = backend.tokenizer(text, add_special_tokens=False)["input_ids"]
    eos = backend.tokenizer.eos_token_id
    segments, _ = read(backend, ids, [-0.5] * len(ids), end=(eos, -0.25))
    written = [token for segment in segments for token in segment.tokens]
    assert written == [*ids, eos] and segments[-1].logprobs[-1] == -0.25
    assert segments[-1].closed == complete and eos not in backend.tokenizer(segments[-1].text)["input_ids"]
    if sizes != [0]:
        assert [len(segment.tokens) for segment in segments] == sizes


def test_a_tag_s_probability_is_that_of_its_words(backend):
    ids = backend.tokenizer("next step one end step answer two end answer", add_special_tokens=False)["input_ids"]
    logprobs = [-0.1 * i for i in range(1, len(ids) + 1)]
    (first, last), priors = read(backend, ids, logprobs)
    assert priors == {"next_step": pytest.approx(math.exp(-0.3))}
    assert first.priors == {"output": pytest.approx(math.exp(-0.6))} and last.logprobs == tuple(logprobs[5:])


def test_a_path_is_read_back_as_it_was_encoded(backend, tokenizer):
    """Or it is left out: where its content closes it."""
    rng, encoder, left_out = random.Random(0), Encoder(tokenizer, backend.tokens), 0
    for number in range(300):
        tags = ["next_step"] * rng.randint(1, 2) + ["verify"] * rng.randint(0, 1) + ["output"]
        steps = tuple(Step(tag, " ".join(rng.choices(WORDS, k=rng.randint(0, 4)))) for tag in tags)
        train = tuple(rng.random() < 0.7 for _ in steps)
        question = Problem(f"p/{number}", "one two")
        example = encoder(Trajectory(question, steps, train, "plain"))
        pairs = [(text.split(), TAGS[tag][1].split()) for tag, text in steps]
        itself = any([*words, *end][i : i + len(end)] == end for words, end in pairs for i in range(len(words)))
        if example is None:
            assert itself
            left_out += 1
            continue
        assert not itself
        prompt = len(
            tokenizer.apply_chat_template([{"role": "user", "content": "one two"}], add_generation_prompt=True)[
                "input_ids"
            ]
        )
        assert example.tokens[-1] == tokenizer.eos_token_id and not any(example.loss[:prompt])
        segments, _ = read(backend, example.tokens[prompt:-1], [0.0] * 99)
        assert tuple(segment.step for segment in segments) == steps and all(s.closed for s in segments)
        flags, at = example.functional[prompt:], 0
        for (tag, _), segment, learned in zip(steps, segments, train, strict=True):
            opening, closing = text_tags(tokenizer, backend.tokens)[tag]
            inner = len(segment.tokens) - len(opening) - len(closing)
            expected = [True] * len(opening) + [False] * inner + [True] * len(closing)
            assert list(flags[at : at + len(segment.tokens)]) == expected
            assert set(example.loss[prompt + at : prompt + at + len(segment.tokens)]) == {learned}
            at += len(segment.tokens)
    assert 5 < left_out < 150


@pytest.mark.parametrize("trainable", ["all", "lora"])
def test_training_sees_the_distribution_that_was_sampled_from(path, tokenizer, tmp_path, trainable):
    """Log-probs of the update's forward pass are the sampler's, over text that may end, without new rows."""
    build(tokenizer).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    module = RLModule(str(tmp_path), tokens=path, trainable=trainable)
    assert module.model.get_input_embeddings().weight.shape[0] == len(tokenizer)
    backend = HFBackend.live(module.model, module.tokenizer, module.table)
    expander = TokenExpander(path, rollouts=6, mode="sample", max_tokens=30, sampling=Sampling(max_segment_tokens=3))
    trees = []
    for number in range(4):
        tree = expander.plant(Problem(f"p/{number}", "one two"), backend)
        for rollout in range(6):
            seed = seed_of(number, rollout)
            (completion,) = backend.generate([expander.ask(tree, 0, backend, seed)])
            node, more = expander.tell(tree, 0, completion, seed)
            assert more is None
            worth = (0.0,) * len(tree.path_segments(node))
            tree.backup(node, Score(Verdict(Status.WRONG), 0.0, worth))
        trees.append(tree)
    rollouts = [rollout for tree in trees for rollout in tree.rollouts()]
    assert any(0 < rollout.length < 30 for rollout in rollouts)  # some end by themselves; none is cut as a segment
    assert max(rollout.length for rollout in rollouts) == 30
    batch = collate(rollouts, module.vocabulary)
    assert not batch.states_BT.any()
    module.model.eval()
    with torch.no_grad():
        found, _ = module.log_probs(batch)
    torch.testing.assert_close(found, batch.behaviour_BT, atol=1e-4, rtol=0)


def test_the_paper_s_tags_as_text_of_a_byte_level_tokenizer(tmp_path):
    """The way it would be done with a real model; contents may hold what looks like a tag of another kind."""
    corpus = ["a < b and b > c </p>", "next step: verify the output, refine"] * 50
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(corpus, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>", pad_token="<|end|>")
    tokenizer.chat_template = build_tokenizer([]).chat_template
    tags = {name: [f"<{name}>", f"</{name}>"] for name in TokenTable.from_yaml().names}
    table = TokenTable.from_yaml(write_table(tmp_path, tags))
    backend = HFBackend.live(build(tokenizer), tokenizer, table)
    steps = (Step("next_step", "a < b > c </p>"), Step("verify", " 3 <verify> 4\n"), Step("output", "ünïcode 猫"))
    example = Encoder(tokenizer, table)(Trajectory(Problem("p", "?"), steps, (True,) * 3, "plain"))
    response = [t for t, learned in zip(example.tokens, example.loss, strict=True) if learned][:-1]
    segments, _ = read(backend, response, [0.0] * len(response))
    assert tuple(segment.step for segment in segments) == steps
    closed = Step("next_step", "a</next_step>b")
    assert Encoder(tokenizer, table)(Trajectory(Problem("p", "?"), (closed,), (True,), "plain")) is None


def test_no_rows_are_added(path, tokenizer):
    model = build(tokenizer)
    before = model.get_input_embeddings().weight.clone()
    assert add_functional_tokens(model, tokenizer, TokenTable.from_yaml(path)) == []
    assert torch.equal(before, model.get_input_embeddings().weight)


def refuse_mask(path, tokenizer):
    read_table(path, ["verify"])


def refuse_tree(path, tokenizer):
    TokenExpander(path)


def refuse_force(path, tokenizer):
    backend = HFBackend.live(build(tokenizer), tokenizer, TokenTable.from_yaml(path))
    backend.generate([Request((1,), 0, 9, after=QUESTION, force="next_step")])


@pytest.mark.parametrize(
    "ask, words",
    [
        (refuse_mask, "which nothing masks"),
        (refuse_tree, "set it to sample"),
        (refuse_force, "set expander.mode to sample"),
    ],
)
def test_what_text_does_not_allow_is_said(path, tokenizer, ask, words):
    with pytest.raises(UserError, match=words):
        ask(path, tokenizer)


@pytest.mark.parametrize(
    "tags, words",
    [
        ({"verify": ["unheard", "end check"]}, "does not read 'unheard' of verify back"),
        ({"verify": ["next", "end"]}, "text of verify begins that of next_step"),
        ({"verify": ["next step", "end"]}, "begins that of"),
    ],
)
def test_tags_that_could_not_be_read_are_refused(tmp_path, tokenizer, tags, words):
    table = TokenTable.from_yaml(write_table(tmp_path, {**TAGS, **tags}))
    with pytest.raises(UserError, match=words):
        text_tags(tokenizer, table)


@pytest.mark.parametrize("text", ["<verify>", ["<verify>"], ["", "x"], [1, 2], {"a": 1, "b": 2}])
def test_the_table_names_both_tags_of_each_token_or_of_none(tmp_path, text):
    table = yaml.safe_load(DEFAULT_TABLE.read_text())
    for token in table["tokens"]:
        token["text"] = text
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(table))
    with pytest.raises(UserError, match="text must be how the opening and the closing tag are written"):
        TokenTable.from_yaml(tmp_path / "t.yaml")
    for token in table["tokens"]:
        token["text"] = ["a", "b"] if token["name"] == "verify" else []
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(table))
    with pytest.raises(UserError, match="text must be"):
        TokenTable.from_yaml(tmp_path / "t.yaml")
