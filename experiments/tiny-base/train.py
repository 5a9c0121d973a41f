"""Train a base model of the embedded world from scratch: ``python experiments/tiny-base/train.py countdown``.

Documents are chats in which each user turn is a functional prompt and each assistant turn one step, with random legal
choices and no knowledge of solutions, and plain chains of thought. Loss on the assistant's turns only.
"""

from __future__ import annotations

import argparse
import itertools
import random
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rftt_lightning.core.contracts import Message, ProblemSource, Step
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.search.expand import COT, dialogue, read_prompts
from rftt_lightning.tiny import arithmetic, countdown
from rftt_lightning.tiny.model import build_model, build_tokenizer

PROMPTS = read_prompts("pkg:tiny/prompts", [*TokenTable.from_yaml().names, COT])


class Recipe(NamedTuple):
    """A world's documents, the words of its tokenizer beside prompts and numbers, how long to train, and how wide a model."""

    world: ModuleType
    source: ProblemSource
    words: str
    numbers: int
    steps: int
    hidden: int = 128


COUNTDOWN = "target combine ok wrong , ; = + - *"
RECIPES = {
    "countdown": Recipe(countdown, countdown.Countdown("train", 8000), COUNTDOWN, 100, 7000),
    "countdown4": Recipe(countdown, countdown.Countdown("train", 20000, numbers=4), COUNTDOWN, 100, 9000, hidden=192),
    "arithmetic": Recipe(arithmetic, arithmetic.Arithmetic("train", 40000), "ok wrong , ; : = + - * ( )", 10, 6000),
}


def chats(recipe: Recipe, seed: int, plain: float = 0.15) -> Iterator[list[Message]]:
    """An endless stream of training chats; a share ``plain`` of them are chains of thought."""
    rng = random.Random(seed)
    problems = recipe.source.problems()
    while True:
        problem = rng.choice(problems)
        if rng.random() < plain:
            steps = [Step(COT, recipe.world.chain_of_thought(problem, rng))]
        else:
            steps = recipe.world.document(problem, rng)
        *before, (tag, last) = steps
        yield [*dialogue(problem.question, before, PROMPTS, ask=tag), Message("assistant", last)]


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
    tokenizer: PreTrainedTokenizerFast, stream: Iterator[list[Message]], positions: int, seed: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """An endless stream of ids and labels, each [rows, width], of at most ``positions`` positions. Rows of like length share a
    batch, so that little is padding; the batches of a pool come in random order."""
    rng = random.Random(seed)
    while True:
        rows = sorted((encode(tokenizer, chat) for chat in itertools.islice(stream, 1000)), key=lambda row: len(row[0]))
        pool: list[list[tuple[list[int], list[int]]]] = [[]]
        for row in rows:
            if (len(pool[-1]) + 1) * len(row[0]) > positions:
                pool.append([])
            pool[-1].append(row)
        rng.shuffle(pool)
        for group in pool:
            width = max(len(ids) for ids, _ in group)
            ids = [ids + [tokenizer.pad_token_id] * (width - len(ids)) for ids, _ in group]
            labels = [labels + [-100] * (width - len(labels)) for _, labels in group]
            yield torch.tensor(ids), torch.tensor(labels)


def optimizers(model: torch.nn.Module, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    named = dict(model.named_parameters())
    matrices = [p for name, p in named.items() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in named.items() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=lr, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.3 * lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(model: torch.nn.Module, stream: Iterator[tuple[torch.Tensor, torch.Tensor]], steps: int, lr: float) -> None:
    """Next-token training with 50 steps of warm-up and linear decay to 0, forward and backward in bf16."""
    steppers = optimizers(model, lr)
    steppers += [LambdaLR(o, lambda step: min(1, (step + 1) / 50) * (1 - step / steps)) for o in steppers]
    began, tokens, mean = time.monotonic(), 0, 0.0
    for step, (ids, labels) in enumerate(itertools.islice(stream, steps)):
        with torch.autocast("cpu", torch.bfloat16):
            logits = model(input_ids=ids).logits[:, :-1]
        loss = cross_entropy(logits.float().flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)
        model.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for stepper in steppers:
            stepper.step()
        tokens += ids.numel()
        mean += (loss.item() - mean) * max(0.01, 1 / (step + 1))
        if step % 100 == 0 or step == steps - 1:
            print(
                f"step {step}  loss {mean:.4f}  positions {tokens}  seconds {time.monotonic() - began:.0f}", flush=True
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("world", choices=list(RECIPES))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--positions", type=int, default=2560, help="tokens of a batch, padding included")
    parser.add_argument("--lr", type=float, default=1e-2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--start", type=Path, help="a checkpoint of this world to go on from, with a learning rate begun anew"
    )
    options = parser.parse_args()
    recipe = RECIPES[options.world]
    words = " ".join([*PROMPTS.values(), recipe.words]).split()
    tokenizer = build_tokenizer(words, recipe.numbers)
    model = build_model(tokenizer, options.seed, recipe.hidden)
    if options.start:
        model.load_state_dict(LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32).state_dict())
    stream = batches(tokenizer, chats(recipe, options.seed), options.positions, options.seed)
    train(model, stream, options.steps or recipe.steps, options.lr)
    out = options.out or Path(f"rftt_lightning/tiny/checkpoints/{options.world}")
    model.to(torch.bfloat16).save_pretrained(out)
    tokenizer.save_pretrained(out)
    print(f"saved {out}")


if __name__ == "__main__":
    main()
