"""Frozen is frozen: what is trained is what was asked for, and export has all of it in plain weights."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from rftt_lightning.core.contracts import UserError
from rftt_lightning.policy.adapters import TRAINABLE, LoRA, adapt

ROWS, TOKENS = [3, 7], torch.tensor([[1, 3, 5, 7, 9, 3, 2, 7]])
ENDS = ("model.embed_tokens.weight", "lm_head.weight")


def tiny(tied: bool = True, dtype: torch.dtype = torch.float32, **more) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=50, tie_word_embeddings=tied, **sizes, **more)).to(dtype)


def trained(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def learn(model: LlamaForCausalLM, steps: int = 3) -> torch.Tensor:
    """Some steps with a weight decay that nobody could overlook; the logits then."""
    optimizer = torch.optim.AdamW(trained(model).values(), lr=0.05, weight_decay=0.5)
    for _ in range(steps):
        model(TOKENS, labels=TOKENS).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model(TOKENS).logits.detach()


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", TRAINABLE[1:])
def test_it_begins_as_the_model_is_and_what_is_frozen_stays_to_the_bit(kind, tied):
    model = tiny(tied)
    before, logits = {name: w.clone() for name, w in model.state_dict().items()}, model(TOKENS).logits
    adapted = adapt(model, ROWS, kind, LoRA(rank=2))
    assert torch.equal(model(TOKENS).logits, logits)
    after = learn(model)
    plain = adapted.merge_and_unload()
    assert type(plain) is LlamaForCausalLM
    torch.testing.assert_close(plain(TOKENS).logits, after, rtol=0, atol=1e-5)
    weights = plain.state_dict()
    assert weights.keys() == before.keys()
    assert (plain.lm_head.weight.data_ptr() == plain.model.embed_tokens.weight.data_ptr()) == tied
    linear = {name for name in before if "_proj" in name}
    for name, weight in weights.items():
        if name in ENDS:
            assert (weight != before[name]).any(1).nonzero().flatten().tolist() == ROWS
        else:
            assert torch.equal(weight, before[name]) == (kind == "functional_rows" or name not in linear), name
    assert len(linear) == 14


@pytest.mark.parametrize("kind", TRAINABLE[1:])
def test_what_is_trained_is_in_float32_also_where_the_rest_is_not(kind):
    model = tiny(dtype=torch.bfloat16)
    adapted = adapt(model, ROWS, kind, LoRA(rank=2))
    assert {p.dtype for p in trained(model).values()} == {torch.float32}
    with torch.autocast("cpu", torch.bfloat16):
        learn(model)
    assert {w.dtype for w in adapted.merge_and_unload().state_dict().values()} == {torch.bfloat16}


def test_all_is_the_model_itself():
    model = tiny()
    assert adapt(model, ROWS, "all", LoRA()) is None
    assert len(trained(model)) == len(list(model.named_parameters()))


def test_lora_has_rank_and_scale_and_targets():
    model = tiny()
    adapt(model, ROWS, "lora", LoRA(rank=3, alpha=6.0, targets=["q_proj"]))
    shapes = {tuple(p.shape) for name, p in trained(model).items() if "lora" in name}
    assert shapes == {(3, 16), (16, 3)} and len(trained(model)) == 1 + 2 * 2
    assert model.model.layers[0].self_attn.q_proj.scaling == {"default": 2.0}


def test_the_beginning_hangs_on_the_seed_alone():
    def start(seed: int) -> list[torch.Tensor]:
        model = tiny()
        torch.manual_seed(len(found))
        noise = torch.get_rng_state()
        adapt(model, ROWS, "lora", LoRA(rank=2), seed)
        assert torch.equal(noise, torch.get_rng_state())
        return [p.detach().clone() for p in trained(model).values()]

    found: list = []
    for seed in (1, 1, 2):
        found.append(start(seed))
    one, again, other = found
    assert all(map(torch.equal, one, again)) and not all(map(torch.equal, one, other))


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda: adapt(tiny(), ROWS, "some", LoRA()), "model.trainable is 'some'; use all, functional_rows or lora"),
        (lambda: adapt(tiny(), ROWS, "lora", LoRA(targets=["nowhere"])), "model.lora: .*nowhere"),
        (lambda: LoRA(rank=0), "rank >= 1"),
        (lambda: LoRA(alpha=0.0), "alpha > 0"),
    ],
)
def test_mistakes_are_one_line(change, words):
    with pytest.raises(UserError, match=words) as error:
        change()
    assert "\n" not in str(error.value)


def test_an_output_embedding_with_a_bias_is_refused():
    model = tiny(tied=False)
    model.lm_head.bias = torch.nn.Parameter(torch.ones(50))
    with pytest.raises(UserError, match="bias"):
        adapt(model, ROWS, "lora", LoRA())
