"""The Hugging Face backend on the tiny base: what it says it sampled from is what the model gives."""

import pytest
import torch

from rftt_lightning.core.contracts import QUESTION, Message, Provenance, Request, Sampling, UserError
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.policy.vocab import add_functional_tokens, load, masked_log_softmax

TABLE = TokenTable.from_yaml()
QUESTIONS = ["3 7 12 target 9", "5 5 5 target 15", "20 19 18 target 37 20 19 18"]


@pytest.fixture(scope="module")
def backend() -> HFBackend:
    model, tokenizer = load("pkg:tiny/checkpoints/countdown", "float32")
    add_functional_tokens(model, tokenizer, TABLE)
    return HFBackend.live(model, tokenizer, TABLE, batch_size=4)


def requests(backend: HFBackend, **sampling) -> list[Request]:
    """Ragged prompts, forced and free beginnings, unequal budgets."""
    setting = Sampling(**{"max_segment_tokens": 9, **sampling})
    made = []
    for seed, question in enumerate(QUESTIONS * 3):
        prompt = backend.chat([Message("user", question)])
        force = [None, "analyze", "next_step"][seed % 3]
        made.append(
            Request(prompt, seed, 20 + seed, setting, after=QUESTION, force=force, segments=[0, 2, 1][seed % 3])
        )
    return made


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0, "boundary": "argmax"}, {"temperature": 0.8}, {"top_p": 0.6, "min_prior": 0.1}]
)
def test_a_completion_does_not_depend_on_its_batch(backend, sampling):
    together = backend.generate(requests(backend, **sampling))
    for request, found in zip(requests(backend, **sampling), together, strict=True):
        (alone,) = backend.generate([request])
        assert [s.tokens for s in alone.segments] == [s.tokens for s in found.segments]
        for one, other in zip(alone.segments, found.segments, strict=True):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_log_probs_and_priors_are_those_of_a_full_forward_pass(backend, temperature):
    for request, completion in zip(
        requests(backend), backend.generate(requests(backend, temperature=temperature)), strict=True
    ):
        response = [t for segment in completion.segments for t in segment.tokens]
        ids = torch.tensor([[*request.prompt, *response]])
        logits = backend.model(input_ids=ids).logits[:, len(request.prompt) - 1 : -1]
        states = backend.vocabulary.states(ids[:, len(request.prompt) :])
        logp = masked_log_softmax(logits, states, backend.vocabulary.allowed_SV, temperature)[0]
        stored = [x for segment in completion.segments for x in segment.logprobs]
        found = logp.gather(1, torch.tensor(response)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(stored), found, atol=1e-4, rtol=0)
        for tag, prior in completion.priors.items():
            assert prior == pytest.approx(
                float(logp[0, backend.vocabulary.opens[TABLE.names.index(tag)]].exp()), abs=1e-4
            )


def test_budgets_grammar_and_provenance_are_kept(backend):
    for request, completion in zip(requests(backend), backend.generate(requests(backend)), strict=True):
        tags = [segment.tag for segment in completion.segments]
        assert TABLE.is_legal(tags)
        assert sum(len(s.tokens) for s in completion.segments) <= request.max_tokens
        assert all(len(s.tokens) <= 9 for s in completion.segments)
        assert all(s.closed for s in completion.segments[:-1])
        assert request.segments == 0 or len(tags) <= request.segments
        first = completion.segments[0]
        assert first.provenance[0] == (Provenance.UCT if request.force else Provenance.SAMPLED)
        assert request.force in (None, first.tag)


def test_rare_functional_tokens_are_never_drawn(backend):
    for completion in backend.generate(requests(backend, min_prior=0.2)):
        priors = completion.priors
        for segment in completion.segments:
            if segment.provenance[0] == Provenance.SAMPLED and priors:
                assert priors[segment.tag] >= 0.2 or priors[segment.tag] == max(priors.values())
            priors = segment.priors


def test_states_are_those_of_a_slow_state_machine(backend):
    vocabulary = backend.vocabulary
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, len(backend.tokenizer), (50, 30), generator=generator)
    for row, states in zip(tokens.tolist(), vocabulary.states(tokens).tolist(), strict=True):
        state = vocabulary.boundary(QUESTION)
        for token, found in zip(row, states, strict=True):
            assert found == state
            if token in vocabulary.opens:
                state = 1 + vocabulary.opens.index(token)
            elif token in vocabulary.closes:
                state = vocabulary.boundary(TABLE.names[vocabulary.closes.index(token)])


def test_a_model_without_functional_tokens_writes_free_text_only():
    base = HFBackend("pkg:tiny/checkpoints/countdown")
    prompt = base.chat([Message("user", "3 7 12 target 9\n\nclarify")])
    (completion,) = base.generate([Request(prompt, 0, 20, Sampling(temperature=0.0), force="clarify")])
    assert completion.segments[0].text == "3 7 12 ; 9" and completion.segments[0].closed
    with pytest.raises(UserError, match="functional token"):
        base.generate([Request(prompt, 0, 20, after=QUESTION)])


def test_what_is_never_legal_is_never_written():
    model, tokenizer = load("pkg:tiny/checkpoints/countdown", "float32")
    add_functional_tokens(model, tokenizer, TABLE)
    masked = HFBackend.live(model, tokenizer, TABLE.without("verify", "refine"))
    made = [
        Request(r.prompt, r.seed, 80, Sampling(max_segment_tokens=9), after=QUESTION, segments=0)
        for r in requests(masked)
    ]
    assert not {s.tag for c in masked.generate(made) for s in c.segments} & {"verify", "refine"}
