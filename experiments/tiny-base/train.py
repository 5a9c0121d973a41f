"""Train a base model of the embedded world from scratch: ``python experiments/tiny-base/train.py countdown``.

Documents are chats in which each user turn is a functional prompt and each assistant turn one step, with random legal
choices and no knowledge of solutions, and plain chains of thought. Loss on the assistant's turns only.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Callable, Iterator
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
    problems = countdown.Countdown("train", count=8000, seed=seed).problems()

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


def batches(
    tokenizer: PreTrainedTokenizerFast, chat: Callable[[], list[Message]], tokens: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An endless stream of ids and labels, each [rows, positions], of about ``tokens`` positions. Rows of like length share a
    batch, so that little is padding; the batches of a pool come in random order."""
    rng = random.Random(0)
    while True:
        rows = sorted((encode(tokenizer, chat()) for _ in range(1000)), key=lambda row: len(row[0]))
        pool: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if (len(pool[-1]) + 1) * len(row[0]) > tokens:
                pool.append([])
            pool[-1].append(row)
        rng.shuffle(pool)
        for group in pool:
            width = max(len(ids) for ids, _ in group)
            ids = [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in group]
            labels = [labels + [-100] * (width - len(labels)) for _, labels in group]
            yield torch.tensor(ids), torch.tensor(labels)


def optimizers(model: torch.nn.Module, lr: float, kind: str) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings, norms and biases."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    others = [p for n, p in model.named_parameters() if p.ndim != 2 or "embed" in n]
    if kind == "adamw":
        return [torch.optim.AdamW(matrices + others, lr=lr, betas=(0.9, 0.95), weight_decay=0.05)]
    muon = torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw")
    return [muon, torch.optim.AdamW(others, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", choices=list(WORDS))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int, default=3500)
    parser.add_argument("--tokens", type=int, default=2560)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--kind", default="adamw")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    tokenizer = build_tokenizer(WORDS[options.world])
    model = build_model(tokenizer, options.seed)
    chat = {"countdown": countdown_chats}[options.world](options.seed)
    steppers = optimizers(model, options.lr, options.kind)
    ramps = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda s: min(1, (s + 1) / 50) * (1 - s / options.steps)) for o in steppers
    ]
    began, tokens, mean = time.monotonic(), 0, 0.0
    for step, (ids, labels) in enumerate(itertools.islice(batches(tokenizer, chat, options.tokens), options.steps)):
        tokens += int((ids != tokenizer.pad_token_id).sum())
        logits = model(input_ids=ids).logits[:, :-1]
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in (*steppers, *ramps):
            stepper.step()
        mean += (loss.item() - mean) * max(0.01, 1 / (step + 1))
        if step % 100 == 0 or step == options.steps - 1:
            print(f"step {step}  loss {mean:.4f}  tokens {tokens}  seconds {time.monotonic() - began:.0f}", flush=True)
    out = options.out or Path(f"rftt_lightning/tiny/checkpoints/{options.world}")
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"saved {out}")


if __name__ == "__main__":
    main()
