"""Self-generated trees as training data: trajectories in, batches out.

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rftt_lightning.core.contracts import Message, ProblemSource, Trajectory, UserError
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.tokenized import chat_ids
from rftt_lightning.policy.vocab import find, plain_tokens, text_tags
from rftt_lightning.search.problems import refuse_overlap
from rftt_lightning.search.store import read_trajectories
from rftt_lightning.training.resume import Order, OrderedData


@dataclass(frozen=True)
class Example:
    """One trajectory as the model sees it: ``Example((5, 9, 130, 7, 146, 2), (False, False, True, True, True, True), …)``.

    ``loss`` is True where a token is to be learned (response, minus steps that curation excluded), ``functional`` where it
    is a functional token, opening or closing. All of one length.
    """

    tokens: tuple[int, ...]
    loss: tuple[bool, ...]
    functional: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class SFTBatch:
    """Rows of trajectories, padded (one a row) or packed (one row of many).

    ``tokens_BT`` ids. ``positions_BT`` count from 0 in each trajectory; where they start anew attention is cut, which is how
    Transformers knows packed rows (no attention mask and no cache may be given then). Padding goes on counting: it stands
    behind what is learned, so a causal model never looks at it. ``loss_BT`` and ``functional_BT`` are bool and say of each
    TARGET token whether it counts. ``denominator`` is the number of loss tokens of the whole optimizer step that this batch
    is a part of: all ranks, all accumulated batches.
    """

    tokens_BT: Tensor
    positions_BT: Tensor
    loss_BT: Tensor
    functional_BT: Tensor
    denominator: int

    def to(self, device: torch.device | str, **kwargs: Any) -> SFTBatch:
        names = ("tokens_BT", "positions_BT", "loss_BT", "functional_BT")
        return replace(self, **{name: getattr(self, name).to(device, **kwargs) for name in names})


class Encoder:
    """Trajectories as ids. Raises :class:`UserError` if the tokenizer lacks a functional token of the table."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, table: TokenTable) -> None:
        known = tokenizer.get_vocab()
        special = ~plain_tokens(tokenizer, max(known.values()) + 1)
        self.tokenizer, self.table, self.refused = tokenizer, table, set(special.nonzero().flatten().tolist())
        if table.as_text:
            self.pairs = text_tags(tokenizer, table)
            return
        if missing := [tag for tag in table.tags if tag not in known]:
            raise UserError(f"the tokenizer has no functional token {missing[0]}; add the tokens to it before encoding")
        self.refused |= {known[tag] for tag in table.tags}
        self.pairs = {token.name: ((known[token.open],), (known[token.close],)) for token in table.tokens}

    def __call__(self, trajectory: Trajectory) -> Example | None:
        """Ids of the chat-templated question, then ``[open] content [close]`` of each step, then end of turn. Every part is
        encoded alone, so nothing merges across a tag. None if a content spells a tag of its own row or a special token, which
        the grammar lets nobody write in a segment, or, where tags are text, closes itself: it would be read back as another
        path."""
        prompt = chat_ids(self.tokenizer, [Message("user", trajectory.problem.question)])
        tokens, loss, functional = list(prompt), [False] * len(prompt), [False] * len(prompt)
        for (tag, text), train in zip(trajectory.steps, trajectory.train, strict=True):
            if tag not in self.table.names:
                raise UserError(
                    f"a trajectory of {trajectory.problem.id} has a step {tag!r}, which is not in the token table"
                )
            content = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            opening, closing = self.pairs[tag]
            if not self.refused.isdisjoint(content) or find((*content, *closing), closing) != len(content):
                return None
            tokens += [*opening, *content, *closing]
            flags = [True] * len(opening) + [False] * len(content) + [True] * len(closing)
            functional += flags
            loss += [train] * len(flags)
        return Example((*tokens, self.tokenizer.eos_token_id), (*loss, True), (*functional, False))


class Examples:
    """Many examples in 6 bytes a token, where an :class:`Example` takes some 50; it is made when it is asked for."""

    def __init__(self) -> None:
        self.tokens, self.loss, self.functional, self.ends = array("i"), bytearray(), bytearray(), array("q", [0])

    def digest(self) -> str:
        """Of every token and flag: the same examples in the same order or others."""
        whole = hashlib.blake2b(digest_size=8)
        for part in (self.tokens, self.loss, self.functional, self.ends):
            whole.update(part)
        return whole.hexdigest()

    def append(self, example: Example) -> None:
        self.tokens.extend(example.tokens)
        self.loss.extend(example.loss)
        self.functional.extend(example.functional)
        self.ends.append(len(self.tokens))

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int) -> Example:
        place = range(len(self))[index]
        part = slice(self.ends[place], self.ends[place + 1])
        flags = (tuple(map(bool, flags[part])) for flags in (self.loss, self.functional))
        return Example(tuple(self.tokens[part]), *flags)


def encode_all(trajectories: Iterable[Trajectory], encoder: Encoder, max_length: int) -> tuple[Examples, Counter[str]]:
    """Examples, and how many were ``kept``, dropped as ``too_long`` (over ``max_length`` tokens), or as ``tag_in_text`` (a tag or a
    special token in the text of a step)."""
    examples, counts = Examples(), Counter(kept=0, too_long=0, tag_in_text=0)
    for trajectory in trajectories:
        example = encoder(trajectory)
        fate = "tag_in_text" if example is None else "too_long" if len(example) > max_length else "kept"
        counts[fate] += 1
        if example is not None and fate == "kept":
            examples.append(example)
    return examples, counts


def collate(examples: Sequence[Example], packed: bool, pad: int, denominator: int) -> SFTBatch:
    """One example a row, padded to the longest with ``pad``; or all in one row."""
    rows = [examples] if packed else [[example] for example in examples]
    width = max(sum(map(len, row)) for row in rows)
    tokens, loss, functional, positions = [], [], [], []
    for row in rows:
        size = sum(map(len, row))
        gap = width - size
        tokens.append([t for example in row for t in example.tokens] + [pad] * gap)
        loss.append([m for example in row for m in example.loss] + [False] * gap)
        functional.append([m for example in row for m in example.functional] + [False] * gap)
        counted = [i for example in row for i in range(len(example))]
        positions.append(counted + list(range(size, width)))
    return SFTBatch(*map(torch.tensor, (tokens, positions, loss, functional)), denominator)


class Batches(Order[SFTBatch]):
    """Batches of ``size`` examples; if ``max_tokens`` is given, of as many as fit in it (padding included), then they are grouped
    once and the order of the groups is shuffled. Each of ``world`` ranks gets every ``world``-th batch; ``accumulate`` batches of
    each make an optimizer step. Where the last step has too few batches for all ranks, the rest get one without loss tokens.
    ``shuffle=False`` keeps the examples' order (validation).
    """

    def __init__(
        self,
        examples: Sequence[Example] | Examples,
        size: int,
        max_tokens: int | None = None,
        packed: bool = False,
        pad: int = 0,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world: int = 1,
        accumulate: int = 1,
    ) -> None:
        super().__init__(seed, shuffle)
        self.examples, self.size, self.max_tokens, self.packed, self.pad = examples, size, max_tokens, packed, pad
        self.rank, self.world, self.accumulate = rank, world, accumulate

    @cached_property
    def known(self) -> dict[str, Any]:
        digest = self.examples.digest() if isinstance(self.examples, Examples) else ""
        sizes = {"batch_size": self.size, "max_tokens": self.max_tokens, "packing": self.packed}
        return {"examples": f"{len(self.examples)} {digest}", **sizes}

    def __len__(self) -> int:
        return -(-len(self.groups(0)) // self.world)

    def batches(self, epoch: int, first: int) -> Iterator[SFTBatch]:
        groups = self.groups(epoch)
        return (self.batch(groups, index) for index in range(first, len(self)))

    def batch(self, groups: Sequence[Sequence[int]], index: int) -> SFTBatch:
        """The ``index``-th batch of this rank, its denominator counted over the optimizer step around it."""
        first = index - index % self.accumulate
        step = groups[first * self.world : (first + self.accumulate) * self.world]
        denominator = sum(sum(self.examples[i].loss) for group in step for i in group)
        where = index * self.world + self.rank
        chosen = [self.examples[i] for i in groups[min(where, len(groups) - 1)]]
        if where >= len(groups):
            chosen = [replace(example, loss=(False,) * len(example)) for example in chosen]
        return collate(chosen, self.packed, self.pad, denominator)

    def groups(self, epoch: int) -> list[list[int]]:
        """Numbers of the examples of each batch of all ranks, in order."""
        if self.max_tokens is None:
            order = self.shuffled(epoch, len(self.examples))
            return [order[i : i + self.size] for i in range(0, len(order), self.size)]
        return [self._filled[i] for i in self.shuffled(epoch, len(self._filled))]

    @cached_property
    def _filled(self) -> list[list[int]]:
        groups: list[list[int]] = []
        for i in self.shuffled(-1, len(self.examples)):
            if groups and self._cost([*groups[-1], i]) <= (self.max_tokens or 0):
                groups[-1].append(i)
            else:
                groups.append([i])
        return groups

    @cached_property
    def _lengths(self) -> list[int]:
        return [len(self.examples[i]) for i in range(len(self.examples))]

    def _cost(self, group: Sequence[int]) -> int:
        lengths = [self._lengths[i] for i in group]
        return sum(lengths) if self.packed else max(lengths) * len(lengths)


@dataclass(frozen=True)
class Part:
    """The trajectories of a store whose problems are kept for validation, or the others. Each pass reads them from the store
    anew, one at a time."""

    folder: str
    fraction: float
    validation: bool

    def __iter__(self) -> Iterator[Trajectory]:
        for trajectory in read_trajectories(self.folder):
            if (share_of(trajectory.problem.id) < self.fraction) == self.validation:
                yield trajectory


class TreeDataModule(OrderedData):
    """Trajectories that curation made from trees. Its trainer's module brings tokenizer and token table. They are read one at
    a time and kept as ids, 6 bytes a token.

    The effective batch of an optimizer step is ``batch_size * trainer.accumulate_grad_batches * devices``.

    Args:
        folder: output folder of ``rftt curate`` (a store of trajectories).
        batch_size: trajectories in one forward pass of one device.
        max_tokens: if given, one forward pass holds as many trajectories as fit in so many tokens, instead of batch_size.
        packing: put the trajectories of a forward pass into one row, without padding. The same loss and gradients; faster only
            with an attention that passes over other trajectories (flash_attention_2), slower on CPUs.
        max_length: longer trajectories (prompt included, in tokens) are dropped, and counted.
        val_fraction: share of problems, chosen by a hash of their ids, that is kept for validation.
        held_out: benchmarks that must not overlap the trajectories' problems.
        allow_overlap: go on in spite of an overlap; nothing is compared then.
        seed: of the order.
    """

    def __init__(
        self,
        folder: str,
        batch_size: int = 8,
        max_tokens: int | None = None,
        packing: bool = False,
        max_length: int = 8192,
        val_fraction: float = 0.05,
        held_out: list[ProblemSource] = [],  # noqa: B006  jsonargparse shows the default
        allow_overlap: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if batch_size < 1 or max_length < 2 or not 0 <= val_fraction < 1 or (max_tokens is not None and max_tokens < 2):
            raise UserError(
                f"data out of range: batch_size {batch_size}, max_length {max_length}, max_tokens {max_tokens}, val_fraction "
                f"{val_fraction}; need batch_size >= 1, max_length >= 2, max_tokens >= 2 or null, 0 <= val_fraction < 1"
            )
        self.folder, self.batch_size, self.max_tokens, self.packing = folder, batch_size, max_tokens, packing
        self.max_length, self.val_fraction, self.seed = max_length, val_fraction, seed
        self.held_out = [] if allow_overlap else held_out
        self.train, self.validation = Part(folder, val_fraction, False), Part(folder, val_fraction, True)

    def setup(self, stage: str) -> None:
        if next(read_trajectories(self.folder), None) is None:
            raise UserError(f"{self.folder} holds no trajectories; make some with `rftt curate --out {self.folder}`")
        if self.held_out:
            questions = {t.problem.question: t.problem for t in read_trajectories(self.folder)}
            for other in self.held_out:
                refuse_overlap(list(questions.values()), other.problems())

    def train_dataloader(self) -> Order[SFTBatch]:
        return self.resumable(self._batches("train", self.train, shuffle=True))

    def val_dataloader(self) -> Batches | list[Any]:
        kept = self.val_fraction > 0 and any(True for _ in self.validation)
        return self._batches("validation", self.validation, shuffle=False) if kept else []

    def _batches(self, name: str, trajectories: Iterable[Trajectory], shuffle: bool) -> Batches:
        trainer, module = self.trainer, self.trainer.lightning_module
        examples, counts = encode_all(trajectories, Encoder(module.tokenizer, module.table), self.max_length)
        rank_zero_info(f"{name} trajectories: " + ", ".join(f"{count} {fate}" for fate, count in counts.items()))
        if not examples:
            raise UserError(
                f"{self.folder}: no {name} trajectory of at most {self.max_length} tokens is left; see max_length"
            )
        return Batches(
            examples,
            self.batch_size,
            self.max_tokens,
            self.packing,
            module.tokenizer.pad_token_id,
            self.seed,
            shuffle,
            trainer.global_rank,
            trainer.world_size,
            trainer.accumulate_grad_batches if shuffle else 1,
        )


def share_of(name: str) -> float:
    """A number in [0, 1) that depends on the name alone."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") / 2**64
