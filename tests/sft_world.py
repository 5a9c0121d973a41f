"""A small world for tests of SFT: words, a tiny random model, and paths to learn."""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning import Callback, Trainer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rftt_lightning.core.contracts import Problem, Step, Trajectory
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.search.store import write_trajectories
from rftt_lightning.tiny.model import build_tokenizer

TABLE = TokenTable.from_yaml()
WORDS = ("one", "two", "three", "four", "five", "six")


class Killed(Callback):
    """Ends training after so many steps, before anything of the last one is saved."""

    def __init__(self, steps: int) -> None:
        self.steps = steps

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.steps:
            raise RuntimeError("killed")


def save_base(folder: Path) -> str:
    """A random model without functional tokens, as a Hugging Face folder. (Beside a Qwen2 config AutoTokenizer would put Qwen's
    own pre-tokenizer in the place of ours.)"""
    tokenizer = build_tokenizer(WORDS)
    build(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert AutoTokenizer.from_pretrained(folder)("one two")["input_ids"] == tokenizer("one two")["input_ids"] != []
    return str(folder)


def build(tokenizer: PreTrainedTokenizerBase, family: str = "llama", attention: str = "sdpa") -> PreTrainedModel:
    """Random, tied, two layers, grouped heads; ``family`` is llama or qwen2."""
    torch.manual_seed(1)
    size = {"vocab_size": len(tokenizer), "hidden_size": 32, "intermediate_size": 64, "max_position_embeddings": 128}
    heads = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True}
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id, "bos_token_id": None}
    config = AutoConfig.for_model(family, **size, **heads, **ids, attn_implementation=attention)
    return AutoModelForCausalLM.from_config(config)


def trajectories(count: int) -> list[Trajectory]:
    """Legal paths of random length; the question's last word is the answer, so there is something to learn."""
    rng = random.Random(0)
    return [_trajectory(rng, i) for i in range(count)]


def _trajectory(rng: random.Random, number: int) -> Trajectory:
    question = " ".join(rng.choices(WORDS, k=rng.randint(2, 6)))
    middle = [Step("next_step", " ".join(rng.choices(WORDS, k=rng.randint(1, 5)))) for _ in range(rng.randint(1, 3))]
    steps = (*middle, Step("output", question.split()[-1]))
    return Trajectory(Problem(f"w/{number}", question, question.split()[-1]), steps, (True,) * len(steps), "plain")


def write_store(folder: Path, paths: Sequence[Trajectory]) -> str:
    write_trajectories(folder, paths, {})
    return str(folder)
