"""Log-probabilities some tokens at a time against those of all logits at once, and gradients too."""

import warnings

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CohereConfig,
    Gemma2Config,
    GPT2Config,
    LlamaConfig,
    PhiConfig,
    PreTrainedModel,
)

from rftt_lightning.core.contracts import UserError
from rftt_lightning.policy import logprobs, objectives
from rftt_lightning.policy.vocab import masked_log_softmax

SIZES = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "untied": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "tied": LlamaConfig(**SIZES, tie_word_embeddings=True),
    "gpt2": GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2),
    "bias": PhiConfig(**SIZES),
    "capped": Gemma2Config(**SIZES, num_key_value_heads=2, head_dim=8, final_logit_softcapping=2.0),
}


def model_of(config) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():  # so that biases, caps and masks matter
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model.eval()


def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids [3, 12], grammar states of the positions before each but the first, and what three states allow."""
    generator = torch.Generator().manual_seed(1)
    allowed = torch.rand(3, 50, generator=generator) < 0.8
    allowed[:, :25] = True
    tokens = torch.randint(0, 25, (3, 12), generator=generator)
    return tokens, torch.randint(0, 3, (3, 11), generator=generator), allowed


def dense(model, temperature: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    tokens, states, allowed = batch()
    logits = model(input_ids=tokens, use_cache=False).logits[:, :-1]
    logp = masked_log_softmax(logits, states, allowed, temperature)
    return objectives.take(logp, tokens[:, 1:]).flatten(), objectives.entropy(logp.detach()).flatten()


def chunked(model, rows: int, temperature: float = 0.7) -> tuple[torch.Tensor, torch.Tensor]:
    """At most ``rows`` tokens at a time."""
    tokens, states, allowed = batch()
    backbone, head = logprobs.parts(model)
    hidden = backbone(input_ids=tokens, use_cache=False).last_hidden_state[:, :-1]
    columns = hidden.flatten(0, 1), tokens[:, 1:].flatten(), states.flatten()
    return logprobs.written(head, *columns, allowed, temperature, at_once=rows * 50)


def gradients(model, logp: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    (logp * torch.linspace(-1, 2, len(logp))).sum().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(model, rows: int) -> None:
    one, other = dense(model), chunked(model, rows)
    torch.testing.assert_close(other, one, rtol=1e-5, atol=1e-5)
    assert not other[1].requires_grad
    expected = gradients(model, one[0])
    found = gradients(model, other[0])
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        torch.testing.assert_close(
            grad, expected[name], rtol=0, atol=1e-5 * max(1.0, float(expected[name].abs().max()))
        )


@pytest.mark.parametrize("rows", [1, 4, 32, 33, 99])
@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_those_of_all_logits_at_once(name, rows):
    model = model_of(CONFIGS[name])
    logprobs.check_parts(model)
    assert_same(model, rows)
    with torch.no_grad():
        torch.testing.assert_close(chunked(model, rows), dense(model), rtol=1e-5, atol=1e-5)


def test_under_autocast_the_head_runs_in_half_precision_as_all_of_it_would():
    model = model_of(CONFIGS["untied"])
    with torch.autocast("cpu", torch.bfloat16):
        one, other = dense(model), chunked(model, 5)
    torch.testing.assert_close(other, one, rtol=0, atol=1e-5)
    assert (other[0] - dense(model)[0]).abs().max() > 1e-3  # it was in half precision
    expected, found = gradients(model, one[0]), gradients(model, other[0])
    for name, grad in found.items():
        torch.testing.assert_close(grad, expected[name], rtol=2e-2, atol=2e-2 * float(expected[name].abs().max()))


class Adapted(nn.Module):
    """A head with a low-rank adapter, as LoRA leaves it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down, self.up = nn.Linear(16, 2, bias=False), nn.Linear(2, 50, bias=False)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return self.base(hidden) + self.up(self.down(hidden))


class Wrapped(nn.Module):
    """What peft lays round a model."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.inner = model

    def get_base_model(self) -> PreTrainedModel:
        return self.inner

    def forward(self, **inputs):
        return self.inner(**inputs)


def test_adapters_in_the_head_and_wrappers_take_part():
    model = model_of(CONFIGS["untied"])
    model.set_output_embeddings(Adapted(model.lm_head))
    wrapped = Wrapped(model)
    logprobs.check_parts(wrapped)
    assert_same(wrapped, 4)
    assert {"inner.lm_head.up.weight", "inner.lm_head.down.weight"} <= gradients(wrapped, chunked(wrapped, 4)[0]).keys()


def test_hooks_of_the_head_fire():
    model, seen = model_of(CONFIGS["untied"]), []
    model.lm_head.register_forward_hook(lambda *_: seen.append(1))
    with torch.no_grad():
        chunked(model, 4)
    assert len(seen) == 9


def test_no_more_logits_exist_than_are_allowed():
    model, seen = model_of(CONFIGS["untied"]), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.append(len(output)))
    logp, _ = chunked(model, 4)
    logp.sum().backward()
    assert max(seen) == 4 and sum(seen) == 2 * 33  # once forward, once again for the gradient
    seen.clear()
    chunked(model, 33)[0].sum().backward()
    assert seen == [33]


def test_no_token_at_all_still_has_a_gradient():
    """A process that has nothing to learn from takes part in the backward pass of the others."""
    model = model_of(CONFIGS["untied"])
    _, head = logprobs.parts(model)
    nothing = torch.zeros(0, dtype=torch.long)
    logp, entropy = logprobs.written(head, torch.zeros(0, 16, requires_grad=True), nothing, nothing, batch()[2])
    logp.sum().backward()
    assert len(logp) == len(entropy) == 0 and model.lm_head.weight.grad.abs().max() == 0


def test_a_model_that_scales_its_logits_in_its_own_way_is_refused():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_of(CohereConfig(**SIZES, logit_scale=0.25))
    with pytest.raises(UserError, match="CohereForCausalLM does more to its logits"):
        logprobs.check_parts(model)
