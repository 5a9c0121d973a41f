"""A small Qwen2-architecture model with random weights, and a byte-level BPE tokenizer trained on problem texts.

It answers nothing right. It stands for a real checkpoint where only the plumbing is in question: the same tokenizer
family, chat template, padded vocabulary and untied head as Qwen2.5-7B-Instruct.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

END_OF_TEXT, TURN_BEGINS, TURN_ENDS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHATML = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def build(texts: Iterable[str], folder: Path, seed: int = 0, vocabulary: int = 1500, turn: int = 12) -> None:
    """Save model and tokenizer in Hugging Face format. ``turn`` is about how many tokens the model writes in a turn."""
    tokenizer = train_tokenizer(texts, vocabulary)
    tokenizer.save_pretrained(folder)
    model = random_model(tokenizer, seed, turn)
    model.save_pretrained(folder)


def train_tokenizer(texts: Iterable[str], vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[END_OF_TEXT, TURN_BEGINS, TURN_ENDS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=TURN_ENDS,
        pad_token=END_OF_TEXT,
        chat_template=CHATML,
        clean_up_tokenization_spaces=False,
    )


def random_model(tokenizer: PreTrainedTokenizerFast, seed: int, turn: int) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=64
        * (len(tokenizer) // 64 + 2),  # padded as Qwen2.5's is: there are spare rows for functional tokens
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen2ForCausalLM(config)
    _end_turns(model, tokenizer.eos_token_id, turn)
    return model


@torch.no_grad()
def _end_turns(model: Qwen2ForCausalLM, end: int, turn: int, temperature: float = 0.7) -> None:
    """Give the end of a turn a probability of about 1/``turn`` at this temperature; a random model would hardly ever stop.

    The head has no bias, so one hidden dimension is made constant and only the head's row of ``end`` reads it.
    """
    model.model.embed_tokens.weight[:, 0] = 0.2
    model.lm_head.weight[:, 0] = 0.0
    hidden = model.model(torch.arange(3, 200)[None]).last_hidden_state[0]
    others = torch.logsumexp(hidden @ model.lm_head.weight.T / temperature, -1).mean()
    model.lm_head.weight[end] = 0.0
    model.lm_head.weight[end, 0] = temperature * (others - math.log(turn - 1)) / hidden[:, 0].mean()
