"""The served backend against a server in a thread: same answers as the same model in process, whatever goes wrong."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterator, Sequence
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fake_server import FakeServer, taught
from rftt_lightning.core.contracts import (
    QUESTION,
    Completion,
    Finish,
    Message,
    Problem,
    Provenance,
    Request,
    Sampling,
    UserError,
)
from rftt_lightning.core.tree import Tree
from rftt_lightning.policy import remote
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.policy.remote import RemoteBackend
from rftt_lightning.policy.vocab import masked_log_softmax
from rftt_lightning.search.driver import grow
from rftt_lightning.search.expand import Expander, PromptExpander, TokenExpander
from scripted import ScriptedReward, ScriptedSource

QUESTIONS = ["3 7 12 target 9", "5 5 5 target 15", "20 19 18 target 37 20 19 18", "1 2 3 target 6"]
ENGINES = ["vllm", "sglang", "llama.cpp"]

pytestmark = pytest.mark.filterwarnings("ignore:.*calls are tried again")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="module")
def hf(folder) -> HFBackend:
    return taught(folder)


@pytest.fixture(scope="module")
def greedy(hf) -> tuple[list[Request], list[Completion]]:
    """Requests, and what the model in process answers."""
    requests = questions(hf, temperature=0.0)
    return requests, hf.generate(requests)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(remote, "WAIT", remote.wait_random_exponential(multiplier=0.01, max=0.1))


@pytest.fixture
def serve(hf, folder):
    """Start a server; gives it and a backend on it."""
    running = []

    def start(engine: str = "vllm", backend: dict[str, Any] = {}, **settings: Any) -> tuple[FakeServer, RemoteBackend]:  # noqa: B006
        server = FakeServer(hf.model, hf.tokenizer, engine, **settings)
        server.start()
        running.append(server)
        given = {"concurrency": 4, "timeout": 5.0, "patience": 20.0, **backend}
        return server, RemoteBackend(server.url, "tiny", str(folder), **given)

    yield start
    for server in running:
        server.stop()


def questions(hf: HFBackend, **sampling: Any) -> list[Request]:
    """Whole paths, forced beginnings, free text; budgets that end within a segment, at one's end, and not at all."""
    setting, made = Sampling(**{"max_segment_tokens": 12, **sampling}), []
    for seed, question in enumerate(QUESTIONS * 2):
        prompt = hf.chat([Message("user", question)])
        force, segments = [None, "analyze", "next_step"][seed % 3], [0, 2, 1][seed % 3]
        made.append(Request(prompt, seed, 4 + 9 * seed, setting, QUESTION, force, segments=segments))
    for seed, question in enumerate(QUESTIONS):
        prompt = hf.chat([Message("user", f"{question}\n\nclarify")])
        made.append(Request(prompt, seed, 3 + 4 * seed, setting, force="clarify"))
    return made


def assert_same(found: Sequence[Completion], expected: Sequence[Completion], within: float = 1e-3) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.finish is other.finish
        assert one.priors == pytest.approx(other.priors, abs=within)
        for mine, theirs in zip(one.segments, other.segments, strict=True):
            assert (mine.tag, mine.tokens, mine.provenance) == (theirs.tag, theirs.tokens, theirs.provenance)
            assert (mine.text, mine.closed, mine.version) == (theirs.text, theirs.closed, theirs.version)
            assert mine.logprobs == pytest.approx(theirs.logprobs, abs=within)
            assert mine.priors == pytest.approx(theirs.priors, abs=within)


# -- equal to the model in process ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "settings"),
    [*((engine, {}) for engine in ENGINES), ("vllm", {"token_ids": False}), ("sglang", {"most": 2})],
)
def test_greedy_answers_are_those_of_the_model_in_process(serve, greedy, engine, settings):
    _, backend = serve(engine, **settings)
    requests, answers = greedy
    assert {c.finish for c in answers} >= {Finish.STOP, Finish.LENGTH, Finish.SEGMENT}
    assert max(len(c.segments) for c in answers) > 3
    assert_same(backend.generate(requests), answers)


def test_favourite_functional_tokens_are_those_of_the_model_in_process(serve, hf):
    _, backend = serve()
    requests = questions(hf, temperature=0.0, boundary="argmax", min_prior=0.1)
    assert_same(backend.generate(requests), hf.generate(requests))


def test_a_context_that_ends_cuts_as_it_does_in_process(serve, hf, monkeypatch):
    length = len(hf.chat([Message("user", QUESTIONS[0])])) + 7
    _, backend = serve("vllm", length=length)
    monkeypatch.setattr(hf, "limit", length)
    requests = [r for r in questions(hf, temperature=0.0, max_segment_tokens=99) if len(r.prompt) < length]
    found = backend.generate(requests)
    assert Finish.CONTEXT in {c.finish for c in found}
    for one, other in zip(found, hf.generate(requests), strict=True):
        assert one.finish is other.finish
        assert [s.tokens for s in one.segments] == [s.tokens for s in other.segments]
    full = Request((*requests[0].prompt, *[10] * 9), 0, 5, after=QUESTION, force="clarify")
    with pytest.warns(UserWarning, match="fills"):
        assert backend.generate([full])[0].finish is Finish.CONTEXT


def expected_logprobs(hf: HFBackend, request: Request, completion: Completion) -> list[float]:
    """Slow and obvious: one full forward pass, then mask, temperature, pruning and nucleus position by position."""
    response = [token for segment in completion.segments for token in segment.tokens]
    if not response:
        return []
    ids, sampling, words = torch.tensor([[*request.prompt, *response]]), request.sampling, hf.vocabulary
    with torch.no_grad():
        logits = hf.model(input_ids=ids).logits[0, len(request.prompt) - 1 : -1]
    first = 0 if request.after is None else words.boundary(request.after)
    states = words.states(ids[:, len(request.prompt) :], first)[0]
    p = masked_log_softmax(logits, states, words.allowed_SV, sampling.temperature or 1.0).double().exp().numpy()
    found = []
    for place, (token, state) in enumerate(zip(response, states.tolist(), strict=True)):
        row = p[place]
        if state > len(words.opens):
            forced = place == 0 and request.force is not None
            kept = row >= (0.0 if forced else min(sampling.min_prior, row.max()))
        else:
            order = np.argsort(-row)
            outside = order[row[order].cumsum() - row[order] >= sampling.top_p]
            kept = ~np.isin(np.arange(len(row)), outside)
        found.append(math.log(row[token] / row[kept].sum()))
    return found


@pytest.mark.parametrize(
    ("engine", "sampling"),
    [
        ("vllm", {"temperature": 0.8, "top_p": 0.7, "min_prior": 0.1}),
        ("vllm", {"temperature": 1.3}),
        ("sglang", {"temperature": 0.7, "min_prior": 0.2}),
        ("llama.cpp", {"temperature": 0.7}),
        ("llama.cpp", {"temperature": 1.0, "boundary": "argmax"}),
    ],
)
def test_log_probs_are_of_the_distribution_that_was_drawn_from(serve, hf, engine, sampling):
    _, backend = serve(engine)
    requests = questions(hf, **sampling)[::2]
    found = backend.generate(requests)
    for request, completion in zip(requests, found, strict=True):
        stored = [x for segment in completion.segments for x in segment.logprobs]
        assert stored == pytest.approx(expected_logprobs(hf, request, completion), abs=1e-3)
        assert sum(len(s.tokens) for s in completion.segments) <= request.max_tokens
        if request.after is not None:
            assert sum(completion.priors.values()) == pytest.approx(1)
            assert backend.tokens.is_legal([s.tag for s in completion.segments])
            given = Provenance.ARGMAX if "boundary" in sampling else Provenance.SAMPLED
            first = request.forced_as if request.force else given
            assert completion.segments[0].provenance[:2] == (first, *[Provenance.SAMPLED][: len(stored) - 1])
    assert_same(backend.generate(requests[:3]), found[:3])  # equal requests, equal answers


def test_functional_tokens_are_drawn_as_often_as_they_are_likely(serve, hf):
    _, backend = serve()
    prompt = hf.chat([Message("user", QUESTIONS[0])])
    made = [Request(prompt, seed, 1, Sampling(min_prior=0.03), after=QUESTION) for seed in range(300)]
    found = backend.generate(made)
    tags, priors = [c.segments[0].tag for c in found], found[0].priors
    likely = {tag: p for tag, p in priors.items() if p >= 0.03}
    assert set(tags) == set(likely) < set(priors)
    for tag, p in likely.items():
        share = p / sum(likely.values())
        assert tags.count(tag) / 300 == pytest.approx(share, abs=4 * math.sqrt(share * (1 - share) / 300))


def test_masked_tokens_are_not_asked_for(serve, hf, folder):
    _, backend = serve(backend={"mask": ["verify", "refine"]})
    tags = {s.tag for c in backend.generate(questions(hf)) for s in c.segments}
    assert tags and not tags & {"verify", "refine"}


def test_tags_as_text_are_refused(serve):
    table = str(Path(__file__).parents[2] / "experiments/claims/tokens_text.yaml")
    with pytest.raises(UserError, match="use HFBackend"):
        serve(backend={"tokens": table})


# -- search --------------------------------------------------------------------------------------------------------------


def expanders() -> list[Expander]:
    greedy = Sampling(temperature=0.0, max_segment_tokens=12)
    return [
        TokenExpander(rollouts=4, sampling=greedy, max_depth=5, max_tokens=50),
        PromptExpander("pkg:tiny/prompts", rollouts=3, final=None, sampling=greedy, max_depth=4, max_tokens=50),
    ]


class Sums(ScriptedSource):
    def __init__(self) -> None:
        self.list = [Problem(f"sum/{i}", question, "9") for i, question in enumerate(QUESTIONS)]


def trees(backend: HFBackend | RemoteBackend, expander: Expander) -> Iterator[Tree]:
    source = Sums()
    grown = grow(source.problems(), expander, backend, ScriptedReward(), source, concurrency=3)
    yield from (tree for _, tree in sorted(grown, key=lambda item: item[0]))


def shape(tree: Tree) -> list[tuple[int, str, tuple[int, ...]]]:
    nodes = range(len(tree.segments))
    return [(tree.parent[n], tree.tag(n), getattr(tree.segments[n], "tokens", ())) for n in nodes]


@pytest.fixture(scope="module")
def expected(hf) -> list[list[Any]]:
    """Shapes of the trees that the model in process grows, by expander."""
    return [[shape(tree) for tree in trees(hf, expander)] for expander in expanders()]


@pytest.mark.parametrize(("engine", "kind"), [("vllm", 0), ("sglang", 0), ("vllm", 1), ("llama.cpp", 1)])
def test_a_greedy_search_grows_the_same_trees(serve, expected, engine, kind):
    _, backend = serve(engine)
    assert [shape(tree) for tree in trees(backend, expanders()[kind])] == expected[kind]
    assert sum(map(len, expected[kind])) > 40


def test_a_server_that_is_killed_and_started_again_twice_loses_no_problem(serve, expected):
    server, backend = serve()
    stop = threading.Event()

    def kill() -> None:
        for count in (10, 40):
            while len(server.bodies) < count and not stop.is_set():
                time.sleep(0.002)
            server.stop()
            time.sleep(0.3)
            server.start()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        found = [shape(tree) for tree in trees(backend, expanders()[0])]
    finally:
        stop.set()
        killer.join()
    assert len(server.bodies) > 40 and backend.usage.failures["connection"] >= 2
    assert found == expected[0]


# -- what goes wrong and is tried again ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        (500, "http_500"),
        (503, "http_503"),
        (429, "http_429"),
        ("reset", "connection"),
        ("torn", "connection"),
        ("garbage", "malformed"),
        ("fewer", "malformed"),
        ("silent", "malformed"),
        ("blank", "malformed"),
        ("nan", "malformed"),
        ("range", "malformed"),
        ("cut", "malformed"),
        ("empty", "malformed"),
    ],
)
def test_a_failure_is_counted_and_tried_again(serve, greedy, fault, name):
    server, backend = serve()
    request, answer = next(pair for pair in zip(*greedy, strict=True) if pair[1].priors and pair[1].segments[0].closed)
    backend.generate([request])
    for faults in ([fault], [0, fault]):  # of the priors, of a content
        server.faults.extend(faults)
        assert_same(backend.generate([request]), [answer])
    assert backend.usage.failures == {name: 2}


@pytest.mark.parametrize("fault", ["hang", "dribble"])
def test_a_call_that_hangs_or_dribbles_is_given_up_and_tried_again(serve, greedy, fault):
    server, backend = serve(backend={"timeout": 0.5})
    server.hang = 1.5
    requests, answers = greedy
    backend.generate(requests[:2])
    server.faults.append(fault)
    assert_same(backend.generate(requests[:2]), answers[:2])
    assert backend.usage.failures == {"timeout": 1}


def test_a_stop_that_is_no_closing_tag_is_gone_on_from(serve, greedy):
    server, backend = serve()
    (request, *_), (answer, *_) = greedy
    backend.generate([request])
    server.faults.extend([0, "early", "early"])  # the priors come first
    assert_same(backend.generate([request]), [answer])
    assert len(server.bodies[-1]["prompt"]) > len(request.prompt) and not backend.usage.failures


def test_retry_after_is_waited_for(serve, hf):
    server, backend = serve()
    backend.generate(questions(hf)[:1])
    server.faults.append(429)
    server.retry_after, began = "1", time.monotonic()
    backend.generate(questions(hf)[:1])
    assert time.monotonic() - began >= 1
    assert remote._seconds(formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=2)
    assert remote._seconds("soon") == 0


def test_patience_ends_in_one_line(serve, hf):
    server, backend = serve(backend={"patience": 0.3})
    backend.generate(questions(hf)[:1])
    server.faults.extend([429] * 1000)
    server.retry_after, began = "1000", time.monotonic()
    with pytest.raises(UserError, match=r"failed . times, last with http_429.*run again") as error:
        backend.generate(questions(hf)[:1])
    server.stop()
    with pytest.raises(UserError, match="last with connection"):
        backend.generate(questions(hf)[:1])
    assert time.monotonic() - began < 5
    assert "\n" not in str(error.value)


def test_endless_nonsense_ends_before_patience(serve, hf):
    server, backend = serve(backend={"patience": 1000.0})
    backend.generate(questions(hf)[:1])
    server.faults.extend(["nan"] * 100)
    with pytest.raises(UserError, match="failed 5 times, last with malformed"):
        backend.generate(questions(hf)[:1])


def test_a_refused_request_is_not_tried_again(serve, hf):
    server, backend = serve()
    backend.generate(questions(hf)[:1])
    before = len(server.bodies)
    server.faults.append(400)
    with pytest.raises(UserError, match=r"refuses the request .400.*fault 400"):
        backend.generate(questions(hf)[:1])
    assert len(server.bodies) == before + 1 and not backend.usage.failures


# -- what cannot be exact is refused -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("engine", "settings", "sampling", "words"),
    [
        ("vllm", {"reported": "raw"}, {}, "logprobs-mode processed_logprobs"),
        ("vllm", {"reported": "masked"}, {}, "logprobs-mode processed_logprobs"),
        ("sglang", {"reported": "masked"}, {}, "RETURN_ORIGINAL_LOGPROB"),
        ("sglang", {}, {"top_p": 0.9}, "sampling.top_p is 0.9"),
        ("llama.cpp", {}, {"top_p": 0.9}, "sampling.top_p is 0.9"),
        ("vllm", {}, {"top_p": 0.9, "temperature": 0.0}, "sampling.top_p is 0.9"),
        ("vllm", {"obedient": False}, {}, "logit_bias forbids"),
        ("llama.cpp", {"obedient": False}, {}, "logit_bias forbids"),
        ("llama.cpp", {"reported": "sampled", "most": 20}, {}, "tells no log-prob of"),
        ("vllm", {"most": 1}, {}, "log-prob"),
    ],
)
def test_log_probs_that_could_not_be_exact_are_refused(serve, hf, engine, settings, sampling, words):
    _, backend = serve(engine, **settings)
    with pytest.raises(UserError, match=words) as error:
        backend.generate(questions(hf, **sampling))
    assert "\n" not in str(error.value)


def test_a_text_prompt_that_is_read_otherwise_is_refused(serve, hf, monkeypatch):
    server, backend = serve("llama.cpp")
    read = server.tokenize
    monkeypatch.setattr(server, "tokenize", lambda text: [1, *read(text)])  # a beginning of its own
    with pytest.raises(UserError, match="reads this one otherwise"):
        backend.generate(questions(hf))


def test_a_text_that_is_no_single_token_is_refused(serve, hf):
    server, backend = serve(token_ids=False)
    server._names[server.tokenizer.get_vocab()["3"]] = "33 3"
    with pytest.raises(UserError, match="'33 3' is not the text of exactly one token"):
        backend.generate(questions(hf, temperature=0.0))


def test_the_wrong_server_is_told_apart(serve, hf, folder, monkeypatch):
    server, backend = serve()
    with pytest.raises(UserError, match="serves tiny, not 'large'"):
        RemoteBackend(server.url, "large", str(folder)).generate(questions(hf))
    monkeypatch.setattr("fake_server.OWNERS", {"vllm": "openai"})
    with pytest.raises(UserError, match="set backend"):
        backend.generate(questions(hf))
    assert RemoteBackend(server.url, "tiny", str(folder), dialect="vllm").generate(questions(hf)[:1])


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"url": "localhost:8000"}, "backend.url"),
        ({"url": "http://host:port"}, "backend.url"),
        ({"dialect": "ollama"}, "backend.dialect"),
        ({"timeout": 0.0}, "backend.timeout"),
        ({"patience": math.inf}, "backend.patience"),
        ({"concurrency": 0}, "batch_size"),
        ({"mask": ["think"]}, "backend.mask"),
        ({"tokenizer": "/nowhere"}, "cannot load tokenizer"),
    ],
)
def test_bad_settings_are_one_line(hf, folder, settings, words):
    with pytest.raises(UserError, match=words) as error:
        RemoteBackend(**{"url": "http://localhost:1", "model": "tiny", "tokenizer": str(folder), **settings})
    assert "\n" not in str(error.value)


# -- many requests -------------------------------------------------------------------------------------------------------


def test_requests_go_together_up_to_the_concurrency(serve, hf):
    server, backend = serve(backend={"concurrency": 3})
    backend.generate(questions(hf))
    assert server.busiest == 3
    assert backend.usage.calls == len(server.bodies) + 1  # the models were asked for, too
    assert backend.usage.seconds["model"] > 0 and backend.usage.reused == len(server.bodies)


def test_answers_come_as_they_are_ready_and_new_requests_join(serve, hf):
    server, backend = serve(backend={"concurrency": 2})
    backend.generate(questions(hf)[:1])
    server.hang = 0.4
    server.faults.append("hang")
    left, rooms, order = questions(hf, temperature=0.0), [], []

    def more(room: int) -> list[Request]:
        rooms.append(room)
        return [left.pop(0) for _ in range(min(room, len(left)))]

    for ready in backend.stream(more):
        order += [number for number, _ in ready]
    assert rooms[:2] == [2, 1] and sorted(order) == list(range(12))
    assert max(order[:5]) > 1  # others were answered while one of the first two hung


def test_closing_a_stream_does_not_wait_for_calls_under_way(serve, hf):
    server, backend = serve(backend={"concurrency": 2})
    backend.generate(questions(hf)[:1])
    server.hang = 0.7
    server.faults.append("hang")  # a request's first call, on which others would follow
    left, before = questions(hf, temperature=0.0), set(threading.enumerate())
    stream = backend.stream(lambda room: [left.pop(0) for _ in range(min(room, len(left)))])
    next(stream)
    began = time.monotonic()
    stream.close()
    assert time.monotonic() - began < 0.5
    assert all(thread.daemon for thread in set(threading.enumerate()) - before)  # the interpreter may end
    time.sleep(0.1)
    sent = len(server.bodies)
    time.sleep(0.8)
    assert len(server.bodies) == sent


# -- weights -------------------------------------------------------------------------------------------------------------


def test_new_weights_are_posted_and_count_as_a_version(serve, hf):
    server, backend = serve(backend={"reload_path": "/load", "reload_body": {"path": "{folder}", "flush": True}})
    backend.reload("/weights/7", 7)
    assert server.posts == [("/load", {"path": "/weights/7", "flush": True})]
    assert {s.version for c in backend.generate(questions(hf)) for s in c.segments} == {7}


def test_weights_are_not_changed_under_a_completion(serve, hf):
    _, backend = serve()
    left = questions(hf)
    stream = backend.stream(lambda room: [left.pop(0) for _ in range(min(room, len(left)))])
    next(stream)
    with pytest.raises(UserError, match="requests are under way"):
        backend.reload("/weights/1", 1)
    stream.close()
    backend.reload("/weights/1", 1)
    assert backend.version == 1


def test_a_server_that_went_away_with_its_new_weights_is_not_trusted(serve, hf):
    server, backend = serve()
    with pytest.raises(UserError, match="cannot load broken: no such weights"):
        backend.reload("broken", 1)
    assert backend.version == 0
    backend.reload("/weights/1", 1)
    server.stop()
    with pytest.raises(UserError, match="weights were replaced"):
        backend.generate(questions(hf)[:1])


def test_the_key_comes_from_the_environment_and_stays_out_of_names(serve, hf, folder, monkeypatch):
    server, _ = serve()
    monkeypatch.setenv("MY_KEY", "secret")
    backend = RemoteBackend(server.url + "/v1/", "tiny", str(folder), api_key_env="MY_KEY")
    backend.generate(questions(hf)[:1])
    assert server.headers[-1]["Authorization"] == "Bearer secret"
    assert backend.name == "tiny (served)"
    assert "secret" not in str(vars(backend))
