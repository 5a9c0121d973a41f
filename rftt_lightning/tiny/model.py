"""The tiny model: a word-level tokenizer with a chat template, and a Llama of about 0.7 M parameters."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

ROLES = ("system", "user", "assistant")
TEMPLATE = (
    "{% for message in messages %}<|{{ message['role'] }}|>{{ message['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer(words: Iterable[str], numbers: int = 100) -> PreTrainedTokenizerFast:
    """One id per word; words are separated by spaces, a run of newlines is one word. The ``numbers`` from 0 on and ``words`` are
    known; ``<|end|>`` ends a turn. Give no word that the base never reads: its row stays like every other untrained one, and a
    functional token that starts from such rows starts equal to the others."""
    special = ["<|pad|>", "<|end|>", "<|unk|>", *(f"<|{role}|>" for role in ROLES)]
    known = dict.fromkeys([*special, "\n", *map(str, range(numbers)), *words])
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(known)}, unk_token="<|unk|>"))
    tokenizer.normalizer = normalizers.Replace(Regex("\n+"), " \n ")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(" +"), "removed")
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<|pad|>",
        eos_token="<|end|>",
        unk_token="<|unk|>",
        additional_special_tokens=[f"<|{role}|>" for role in ROLES],
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = TEMPLATE
    return fast


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, hidden: int = 128, layers: int = 4
) -> LlamaForCausalLM:
    """A randomly initialised Llama with tied embeddings for this tokenizer.

    Not a Qwen2: Transformers 5 loads every tokenizer beside a ``qwen2`` config as byte-level BPE, whatever was saved.
    """
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=5 * hidden // 2,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
    )
    return LlamaForCausalLM(config)
