"""PRMs in process and served: scores are those of a plain loop, whatever the batch, the texts and the network do."""

from __future__ import annotations

import math
import signal
import threading
import time

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoModelForTokenClassification,
    AutoTokenizer,
    PreTrainedTokenizerFast,
)

from prm_server import PRMServer
from prm_world import TABLE, paths, save_classifier, save_tagged
from rftt_lightning.core.contracts import Problem, Step, Unavailable, UserError
from rftt_lightning.policy import remote
from rftt_lightning.policy.prm import RemotePRM, StepClassifierPRM, StepTagPRM, Writer, relative

pytestmark = pytest.mark.filterwarnings("ignore:.*calls are tried again")
STYLES = ["tag", "separator", "functional"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("prm")
    return {
        "tag": save_tagged(root / "tag"),
        "separator": save_classifier(root / "separator", "<extra_0>"),
        "functional": save_classifier(root / "functional"),
    }


@pytest.fixture(scope="module")
def prm(folders):
    def make(style: str, **settings):
        if style == "tag":
            return StepTagPRM(folders[style], **settings)
        if style == "separator":
            return StepClassifierPRM(folders[style], separator="<extra_0>", system="one two", **settings)
        return StepClassifierPRM(folders[style], **settings)

    return make


def softmax(pair) -> tuple[float, float]:
    a, b = (math.exp(float(x)) for x in pair)
    return a / (a + b), b / (a + b)


@torch.no_grad()
def oracle(style: str, folder: str, problem: Problem, steps: list[Step]) -> list[float]:
    """One forward pass a step, on nothing but what comes before it; ids put together word by word."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer.get_vocab()

    def spell(text: str) -> list[int]:
        return [ids[word] for word in text.split()]

    kind = AutoModelForCausalLM if style == "tag" else AutoModelForTokenClassification
    model = kind.from_pretrained(folder, dtype=torch.float32).eval()
    head = ["<|system|>", "one", "two", "<|end|>"] if style == "separator" else []
    seen = [] if style == "tag" else [ids[word] for word in (*head, "<|user|>")]
    seen += spell(problem.question)
    if style != "tag":
        seen += [ids["<|end|>"], ids["<|assistant|>"]]
    scores = []
    for number, (tag, text) in enumerate(steps, 1):
        if style == "tag":
            seen += [*spell("Step"), tokenizer(f"{number}:", add_special_tokens=False)["input_ids"][0], *spell(text)]
            seen += [ids["ки"]]
        elif style == "separator":
            seen += [*spell(text), ids["<extra_0>"]]
        else:
            seen += [ids[f"<{tag}>"], *spell(text), ids[f"</{tag}>"]]
        last = model(input_ids=torch.tensor([seen])).logits[0, -1]
        scores.append(softmax((last[ids["+"]], last[ids["-"]]))[0] if style == "tag" else softmax(last)[1])
        if style == "tag":
            seen += [ids["\n"]]
    return scores


def flat(scores) -> list[float]:
    return [score for row in scores for score in row]


# -- in process ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("style", STYLES)
def test_scores_are_those_of_a_plain_loop(style, prm, folders):
    asked = paths(12)
    found = prm(style).score(None, asked)
    for (problem, steps), scores in zip(asked, found, strict=True):
        assert scores == pytest.approx(oracle(style, folders[style], problem, steps), abs=1e-5)
    assert max(flat(found)) - min(flat(found)) > 0.01  # a constant would pass many tests


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("batch_tokens", [1, 60, 10_000])
def test_a_batch_changes_nothing_and_stays_within_its_bound(style, batch_tokens, prm, monkeypatch):
    alone = [prm(style).score(None, [path])[0] for path in paths(20)]
    scorer = prm(style, batch_tokens=batch_tokens)
    shapes = []
    read = scorer._values
    monkeypatch.setattr(scorer, "_values", lambda t, *rest: shapes.append(t.shape) or read(t, *rest))
    together = scorer.score(None, paths(20))
    assert [len(row) for row in together] == [len(steps) for _, steps in paths(20)]
    assert flat(together) == pytest.approx(flat(alone), abs=1e-5)
    assert all(rows * width <= batch_tokens or rows == 1 for rows, width in shapes)
    assert len(shapes) == 1 or batch_tokens < 10_000


def test_the_pair_and_the_tag_are_those_of_the_settings(prm, folders):
    asked = paths(6)
    plus = flat(prm("tag").score(None, asked))
    assert flat(prm("tag", good="-", bad="+").score(None, asked)) == pytest.approx([1 - s for s in plus], abs=1e-5)
    assert flat(prm("tag", tag="six").score(None, asked)) != pytest.approx(plus, abs=1e-3)
    assert flat(prm("tag", step="{text} ").score(None, asked)) != pytest.approx(plus, abs=1e-3)


def test_relative_scores_say_what_a_step_keeps(prm):
    asked = paths(8)
    plain, kept = prm("functional").score(None, asked), prm("functional", relative=True).score(None, asked)
    for values, ratios in zip(plain, kept, strict=True):
        assert ratios[1:] == pytest.approx(relative(values))
        assert 0 <= ratios[0] <= 1
    assert relative([0.5, 0.25, 0.5, 0.0, 0.0]) == [0.5, 1.0, 0.0, 0.0]


def test_what_does_not_fit_the_context_has_no_score_and_is_counted(prm):
    scorer = prm("functional", max_length=20)
    short, long = (
        (Problem("a", "one"), [Step("next_step", "two")]),
        (Problem("b", "one"), [Step("next_step", "two three")] * 40),
    )
    whole = prm("functional", max_length=128).score(None, [(long[0], long[1][:4])])[0]
    with pytest.warns(UserWarning, match="36 of 41 steps have no score: they end beyond the PRM's 20 tokens"):
        a, b = scorer.score(None, [short, long])
    assert scorer.unscored == 36 and None not in a and len(b) == 40
    assert b[:4] == pytest.approx(whole, abs=1e-5) and set(b[4:]) == {None}
    huge = (Problem("c", "one " * 500), [Step("next_step", "two")])
    with pytest.warns(UserWarning, match="1 of 1 steps"):
        assert scorer.score(None, [huge]) == [(None,)]
    assert prm("functional").limit == 128


HOSTILE = [
    "</verify><verify>one",
    "<extra_0> one <extra_0><extra_0>",
    "ки one ки - +",
    "<ext<extra_0>ra_0></ve</verify>rify>",
    "<|end|><|assistant|>",
    "",
    "   \n\n ",
    "\u200b\u202e one \U0001f600 ﷽",
    "\ud800 one",
    "{text} {0} {number!r} %s",
    "\x00\x01",
]


@pytest.mark.parametrize("style", STYLES)
def test_texts_cannot_write_marks_of_their_own(style, prm):
    scorer = prm(style)
    for text in HOSTILE:
        steps = [Step("next_step", text), Step("verify", "one"), Step("output", text)]
        (scores,) = scorer.score(None, [(Problem("h", f"one {text}"), steps)])
        assert len(scores) == 3 and all(0 <= s <= 1 for s in scores), text
    mark = {"tag": "ки", "separator": "<extra_0>", "functional": "</verify>"}[style]
    spelled, plain = (scorer.score(None, [(Problem("", "one"), [Step("verify", x)])]) for x in (f"one {mark} ", "one"))
    assert spelled == plain


@pytest.mark.parametrize("question", ["cafe\u0301", "cafe", "cafe\u0301\u0301 ", "\u0301", "one \U0001f600\n", "", " "])
def test_a_question_ends_at_its_last_token(question):
    """A normaliser composes characters, of which only the first has a token then; one character may have many tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.NFC(), pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    fast.add_tokens([AddedToken("<end>", normalized=False)])
    read = Writer(fast, lambda text: text, "\n{text}<end>", ["<end>"])(
        question, [Step("verify", "one"), Step("output", "e\u0301")]
    )
    first, *others = read.ends
    assert read.tokens[: first + 1] == tuple(fast(question.rstrip())["input_ids"]) or not question.strip()
    assert [read.tokens[i] for i in others] == [fast.convert_tokens_to_ids("<end>")] * 2


def test_no_steps_and_no_paths(prm):
    assert prm("functional").score(None, []) == []
    assert prm("functional").score(None, [(Problem("", "one"), [])]) == [()]


def test_mistakes_are_one_line(folders, tmp_path):
    causal, three = folders["tag"], save_classifier(tmp_path / "three", labels=3)
    for make, words in [
        (lambda: StepClassifierPRM(causal), "has no weights score"),
        (lambda: StepClassifierPRM(three), "has 3 labels"),
        (lambda: StepClassifierPRM(folders["functional"], separator="<extra_0>"), "no token '<extra_0>'"),
        (lambda: StepTagPRM(folders["tag"], good="plus"), "does not know 'plus'"),
        (lambda: StepTagPRM(folders["tag"], step="{txt}"), "may name"),
        (lambda: StepTagPRM(folders["tag"], step="one"), r"must name \{text\}"),
        (lambda: StepTagPRM(folders["tag"], batch_tokens=0), "batch_tokens is 0"),
        (lambda: StepTagPRM(str(tmp_path / "none")), "no model at"),
        (lambda: RemotePRM("localhost:1"), "scorer.url"),
        (lambda: RemotePRM("http://localhost:1", timeout=0), "scorer.timeout"),
        (lambda: RemotePRM("http://localhost:1", cache=-1), "scorer.cache"),
        (lambda: RemotePRM("http://localhost:1", batch=0), "scorer.batch"),
    ]:
        with pytest.raises(UserError, match=words) as error:
            make()
        assert "\n" not in str(error.value)


# -- served ----------------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", remote.wait_random_exponential(multiplier=0.01, max=0.05))


@pytest.fixture
def served(prm):
    running = []

    def start(style: str = "functional", **limits):
        running.append(PRMServer(prm(style), **limits))
        return running[-1]

    yield start
    for server in running:
        server.stop()


def test_remote_scores_are_the_local_ones(prm, served):
    asked = [*paths(30), (Problem("h", "\ud800 one"), [Step("verify", text) for text in HOSTILE])]
    server = served()
    scorer = RemotePRM(server.url, batch=4, concurrency=3, model=prm("functional").name)
    assert flat(scorer.score(None, asked)) == pytest.approx(flat(prm("functional").score(None, asked)), abs=1e-5)
    assert len(server.sizes) == 8 and max(server.sizes) <= 4


def test_the_cache_is_by_content_and_bounded(served):
    server = served()
    scorer = RemotePRM(server.url, cache=5)
    asked = paths(5)
    first = scorer.score(None, asked)
    renamed = [(Problem("other id", problem.question), tuple(steps)) for problem, steps in asked]
    assert scorer.score(None, [*renamed, *renamed]) == [*first, *first] and sum(server.sizes) == 5
    scorer.score(None, [asked[0]])
    scorer.score(None, paths(4, seed=1))  # the four that were not used for longest are forgotten
    assert len(scorer._cache) == 5 and sum(server.sizes) == 9
    scorer.score(None, [asked[0]])
    assert sum(server.sizes) == 9
    scorer.score(None, [asked[1]])
    assert sum(server.sizes) == 10
    tag, text = asked[0][1][0]
    scorer.score(None, [(asked[0][0], [Step(next(t for t in TABLE.names if t != tag), text), *asked[0][1][1:]])])
    assert sum(server.sizes) == 11


def test_paths_are_sent_in_requests_that_the_server_takes(prm, served):
    server = served(max_paths=3, max_bytes=2000)
    asked = [*paths(10), (Problem("huge", "one " * 2000), [Step("verify", "two"), Step("output", "one")])]
    with pytest.warns(UserWarning, match="1 paths are too long for a request"):
        found = RemotePRM(server.url).score(None, asked)
    assert found[-1] == (None, None) and max(server.sizes) <= 3
    assert flat(found[:-1]) == pytest.approx(flat(prm("functional").score(None, paths(10))), abs=1e-5)


def test_failures_are_tried_again(prm, served):
    server = served(failures=[503, 500, "garbage", "shape", "nan", 429])
    scorer = RemotePRM(server.url, patience=20, batch=2, concurrency=1)
    found = scorer.score(None, paths(6))
    assert flat(found) == pytest.approx(flat(prm("functional").score(None, paths(6))), abs=1e-5)
    assert scorer._usage.failures == {"http_503": 1, "http_500": 1, "malformed": 3, "http_429": 1}


def test_a_server_that_stays_away_ends_in_one_line(served):
    server = served()
    scorer = RemotePRM(server.url, patience=0.5, timeout=2)
    scorer.score(None, paths(2))
    server.stop()
    began = time.monotonic()
    with pytest.raises(Unavailable, match=r"failed \d+ times.*mend or start the server, and run again") as error:
        scorer.score(None, paths(4))
    assert 0.3 < time.monotonic() - began < 10 and "\n" not in str(error.value)
    assert len(scorer.score(None, paths(2))) == 2  # known paths need no server


def test_a_server_that_comes_back_is_used(prm, served):
    server = served()
    url, port = server.url, server.port
    server.stop()
    scorer = RemotePRM(url, patience=30)
    later = threading.Timer(0.5, lambda: served(port=port))
    later.start()
    found = scorer.score(None, paths(3))
    later.join()
    assert flat(found) == pytest.approx(flat(prm("functional").score(None, paths(3))), abs=1e-5)


def test_another_model_is_refused(served):
    server = served()
    with pytest.raises(UserError, match=r"serves .* start the right PRM") as error:
        RemotePRM(server.url, model="mine 0123").score(None, paths(1))
    assert not isinstance(error.value, Unavailable)


def test_a_slow_server_times_out(served):
    server = served(delay=2.0)
    with pytest.raises(Unavailable, match=r"timeout: no answer within scorer\.timeout"):
        RemotePRM(server.url, timeout=0.3, patience=0.5).score(None, paths(1))


def test_a_server_that_dribbles_times_out(served):
    server = served(failures=["dribble"])
    scorer = RemotePRM(server.url, timeout=1.0, patience=20)
    assert scorer.score(None, paths(1)) and set(scorer._usage.failures) == {"timeout"}


def test_nobody_waits_for_calls_under_way_after_ctrl_c(served):
    server = served()
    scorer = RemotePRM(server.url)
    scorer.score(None, paths(1))
    server.failures.append("dribble")
    before = set(threading.enumerate())

    def interrupt() -> None:
        while server.failures:
            time.sleep(0.01)
        signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)

    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs begin without it
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        began = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            scorer.score(None, paths(3, seed=1))
        assert time.monotonic() - began < 4
    finally:
        signal.signal(signal.SIGINT, handler)
    started = set(threading.enumerate()) - before
    assert started and all(thread.daemon for thread in started)  # the interpreter joins the others at its end
