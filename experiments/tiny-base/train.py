"""Train a base model of the embedded world from scratch: ``python experiments/tiny-base/train.py countdown``.

Documents are chats in which each user turn is a functional prompt and each assistant turn one step, with random legal
choices and no knowledge of solutions, and plain chains of thought. Loss on the assistant's turns only.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from rftt_lightning.core.contracts import Message
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.search.expand import COT, dialogue, read_prompts
from rftt_lightning.tiny import countdown
from rftt_lightning.tiny.model import build_model, build_tokenizer

WORDS = {"countdown": "target combine ok wrong clarify analyze subquestion next step direct answer verify refine output solve "
         ", ; = + - *".split()}  # fmt: skip


def countdown_chats(seed: int, plain: float = 0.15) -> Callable[[], list[Message]]:
    """An endless stream of training chats; a share ``plain`` of them are chains of thought."""
    rng = random.Random(seed)
    prompts = read_prompts("pkg:tiny/prompts", [*TokenTable.from_yaml().names, COT])
    problems = countdown.Countdown("train", count=12000, seed=seed).problems()

    def chat() -> list[Message]:
        problem = rng.choice(problems)
        if rng.random() < plain:
            turns = dialogue(problem.question, [], prompts, ask=COT)
            return [*turns, Message("assistant", countdown.chain_of_thought(problem, rng))]
        steps = countdown.document(problem, rng)
        turns = dialogue(problem.question, steps[:-1], prompts, ask=steps[-1].tag)
        return [*turns, Message("assistant", steps[-1].text)]

    return chat


def encode(tokenizer: PreTrainedTokenizerFast, chat: list[Message]) -> tuple[list[int], list[int]]:
    """Ids of a chat, and labels that are -100 outside the assistant's turns."""
    ids: list[int] = []
    labels: list[int] = []
    for message in chat:
        turn = tokenizer(f"<|{message.role}|>{message.content}<|end|>")["input_ids"]
        ids += turn
        labels += [-100, *turn[1:]] if message.role == "assistant" else [-100] * len(turn)
    return ids, labels


def batch(tokenizer: PreTrainedTokenizerFast, chat: Callable[[], list[Message]], rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    encoded = [encode(tokenizer, chat()) for _ in range(rows)]
    width = max(len(ids) for ids, _ in encoded)
    ids = torch.tensor([row + [tokenizer.pad_token_id] * (width - len(row)) for row, _ in encoded])
    labels = torch.tensor([row + [-100] * (width - len(row)) for _, row in encoded])
    return ids, labels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", choices=list(WORDS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = build_tokenizer(WORDS[options.world])
    model = build_model(tokenizer, options.seed)
    chat = {"countdown": countdown_chats}[options.world](options.seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=options.lr, betas=(0.9, 0.95), weight_decay=0.05)
    ramp = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: min(1, (s + 1) / 50) * (1 - s / options.steps))
    began, tokens = time.monotonic(), 0
    for step in range(options.steps):
        ids, labels = batch(tokenizer, chat, options.rows)
        tokens += int((ids != tokenizer.pad_token_id).sum())
        logits = model(input_ids=ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        ramp.step()
        if step % 100 == 0 or step == options.steps - 1:
            print(f"step {step}  loss {loss:.4f}  tokens {tokens}  seconds {time.monotonic() - began:.0f}", flush=True)
    out = options.out or Path(f"rftt_lightning/tiny/checkpoints/{options.world}")
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"saved {out}")


if __name__ == "__main__":
    main()
