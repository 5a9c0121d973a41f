"""Tiny random PRMs of both styles, as Hugging Face folders, and paths to score."""

from __future__ import annotations

import random
from pathlib import Path

import torch
from transformers import AutoConfig, LlamaForTokenClassification

from rftt_lightning.core.contracts import Problem, Step
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.vocab import add_functional_tokens
from rftt_lightning.tiny.model import build_tokenizer
from sft_world import WORDS, build

TABLE = TokenTable.from_yaml()


def save_tagged(folder: Path) -> str:
    """A causal LM whose tokenizer knows a step tag, + and -."""
    tokenizer = build_tokenizer((*WORDS, "ки", "+", "-", "Step"))
    build(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def save_classifier(folder: Path, separator: str | None = None, labels: int = 2, limit: int = 128) -> str:
    """A token classifier that knows the functional tokens, and a separator if one is given."""
    tokenizer = build_tokenizer(WORDS)
    if separator:
        tokenizer.add_special_tokens({"additional_special_tokens": [separator]}, replace_extra_special_tokens=False)
    torch.manual_seed(2)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(
        "llama",
        vocab_size=len(tokenizer),
        max_position_embeddings=limit,
        num_labels=labels,
        pad_token_id=0,
        initializer_range=0.3,
        **sizes,
    )
    model = LlamaForTokenClassification(config)
    add_functional_tokens(model, tokenizer, TABLE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def paths(count: int, seed: int = 0) -> list[tuple[Problem, list[Step]]]:
    rng = random.Random(seed)

    def words(low: int, high: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(low, high)))

    return [
        (
            Problem(f"w/{i}", words(1, 6)),
            [Step(rng.choice(TABLE.names), words(0, 5)) for _ in range(rng.randint(1, 6))],
        )
        for i in range(count)
    ]
