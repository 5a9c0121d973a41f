"""The in-process backend: any Hugging Face causal LM, live weights, batched decoding under the grammar's mask."""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rftt_lightning.core.contracts import QUESTION, Completion, Finish, Provenance, Request, Segment, UserError, collect
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.decode import Batch, Row
from rftt_lightning.policy.prefix import PrefixCache
from rftt_lightning.policy.tokenized import TokenizedBackend, read_table
from rftt_lightning.policy.vocab import end_ids, find, load, text_tags

CHUNK = 1 << 22
"""Bytes of weights that are digested at a time: few calls on a GPU, and what a CPU's cache holds."""


class HFBackend(TokenizedBackend):
    """Decodes requests in batches of ``batch_size`` rows.

    Args:
        model: Hugging Face folder, ``pkg:`` path or hub name.
        tokens: functional-token table (YAML); None is the paper's.
        batch_size: rows decoded together.
        dtype: "auto" takes the checkpoint's on a GPU, and "float32" on the CPU, where it is usually fastest.
        device: "auto" is CUDA if there is one, else the CPU.
        attention: Transformers' attention implementation.
        mask: functional tokens that are never legal (masking verify and refine at inference, say).
        cache_gb: GiB in which the keys and values of prefixes are kept, on the model's device, so that no token of a tree is
            read twice; what was not used for longest gives way. 0 keeps none. The batch itself takes memory beside that: its rows
            times the longest of them. Whoever switches adapters of the model must raise ``version``.
    """

    def __init__(
        self,
        model: str,
        tokens: str | None = None,
        batch_size: int = 128,
        dtype: str = "auto",
        device: str = "auto",
        attention: str = "sdpa",
        mask: Sequence[str] = (),
        cache_gb: float = 4.0,
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto" and device == "cpu":
            dtype = "float32"
        table = read_table(tokens, mask)
        self._attach(*load(model, dtype, attention, device), table, batch_size, cache_gb)
        precision = str(self.model.dtype).removeprefix("torch.")
        self.name = f"{model} {fingerprint(self.model)} {precision}"  # stores refuse to mix the trees of two models

    @classmethod
    def live(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        table: TokenTable,
        batch_size: int = 128,
        cache_gb: float = 4.0,
    ) -> HFBackend:
        """A backend on a model that is being trained: every call decodes with the weights of that moment."""
        backend = cls.__new__(cls)
        backend._attach(model, tokenizer, table, batch_size, cache_gb)
        return backend

    def _attach(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        table: TokenTable,
        batch_size: int,
        cache_gb: float,
    ) -> None:
        if cache_gb < 0:
            raise UserError(f"backend.cache_gb is {cache_gb}; it must be at least 0 (0: no prefix is kept)")
        if getattr(model, "_is_stateful", False):
            raise UserError(
                f"{type(model).__name__} keeps a state that cannot be forked; use a model with a standard cache"
            )
        width = model.get_output_embeddings().weight.shape[0]
        ends = end_ids(tokenizer, model.generation_config)
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        self._bind(tokenizer, table, width, ends, limit, batch_size)
        self._tags = text_tags(tokenizer, table) if table.as_text else {}
        self.model, self.version, self.closes = model, 0, frozenset(self.vocabulary.closes)
        self.usage.cache_budget = int(cache_gb * 2**30)
        self._prefixes = PrefixCache(self.usage.cache_budget)

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return collect(self, requests)

    @torch.no_grad()
    def stream(self, more: Callable[[int], Sequence[Request]]) -> Iterator[list[tuple[int, Completion]]]:
        numbers, ready = itertools.count(), []

        def checked(room: int) -> list[tuple[int, Request]]:
            fitting = []
            for request, number in zip(more(room), numbers, strict=False):
                self.check(request)
                if len(request.prompt) < self.limit:
                    fitting.append((number, self._freed(request)))
                else:
                    ready.append((number, self.unwritten(request)))
            return fitting

        batch = Batch(self.model, self.vocabulary, self.ends, self.limit, self.batch_size, self._prefixes, self.usage)
        # Listed once: to go through a model takes as long as to write some tokens with a small one.
        modules, weights = list(self.model.modules()), list(self.model.parameters())
        stamp, busy = None, True
        while busy:
            if stamp != (now := self._stamp(weights)):
                if len(batch):
                    raise RuntimeError("the model's weights changed while requests were under way")
                stamp = now
                self._prefixes.renew((stamp, fingerprint(self.model)))
            with _evaluating(modules):
                busy = self._decode(batch, checked, ready)
            if ready:
                yield ready
                ready = []

    def _freed(self, request: Request) -> Request:
        """Where tags are text, a path is free text of no tag, with the path's budget."""
        if not self._tags or request.after is None:
            return request
        whole = replace(request.sampling, max_segment_tokens=request.max_tokens)
        return replace(request, sampling=whole, after=None, force=None)

    def _decode(
        self,
        batch: Batch,
        more: Callable[[int], Sequence[tuple[int, Request]]],
        ready: list[tuple[int, Completion]],
    ) -> bool:
        """Decode until it is time to hand over what is ``ready``: when rows are lacking, and before there is too much to take in
        at once. Returns whether there may be more to do."""
        try:
            while True:
                full = batch.admit(more)
                if not len(batch):
                    return bool(ready)
                ready += [(number, self._completion(request, row)) for number, request, row in batch.step()]
                lacking = not full and self.batch_size - len(batch) >= max(self.batch_size // 16, 1)
                if ready and (lacking or len(ready) >= max(self.batch_size // 4, 1)):
                    return True
        except BaseException:  # a prefix may be noted whose keys and values are not there yet
            self._prefixes.release()
            raise

    def _stamp(self, weights: Sequence[Tensor]) -> tuple[object, ...]:
        """What keys and values are valid for: the policy version; and, should a caller have forgotten to raise that, where the
        weights are and how often they were written. Not seen: writes through ``.data`` under way, adapters that are switched."""
        places = tuple((p.data_ptr(), p.dtype, p.device, 0 if p.is_inference() else p._version) for p in weights)
        kind = self.model.device.type
        return self.version, places, torch.is_autocast_enabled(kind) and torch.get_autocast_dtype(kind)

    def release(self) -> None:
        """Give back the memory of all keys and values."""
        self._prefixes.release()

    # -- from decoded rows to completions --------------------------------------------------------------------------------

    def _completion(self, request: Request, row: Row) -> Completion:
        if request.after is None:
            if self._tags and request.force is None:
                segments, priors = self._read(request, row)
                return Completion(segments, priors, row.computed, row.finish)
            tokens = tuple(row.tokens)
            chosen = (int(Provenance.SAMPLED),) * len(tokens)
            text, closed = self.text(tokens), row.finish is Finish.STOP
            segment = Segment(request.force or "", tokens, tuple(row.logprobs), chosen, text, closed, {}, self.version)
            return Completion((segment,), {}, row.computed, row.finish)
        ends = [i + 1 for i, token in enumerate(row.tokens) if token in self.closes]
        bounds = [0, *ends] if ends and ends[-1] == len(row.tokens) else [0, *ends, len(row.tokens)]
        segments = tuple(self._segment(request, row, begin, end) for begin, end in itertools.pairwise(bounds))
        return Completion(segments, self._priors(row, 0), row.computed, row.finish)

    def _read(self, request: Request, row: Row) -> tuple[tuple[Segment, ...], dict[str, float]]:
        """Segments of a rollout whose tags are text, and the priors before them.

        What stands in place of a tag, that of a token that the grammar does not let follow included, is a segment without tag
        that is not closed, to the end; after the segments that are asked for nothing is read. The end of turn is a token of the
        path, else nobody would learn not to give up. Of the priors only that of the token which was written is known."""
        tokens, logprobs, last = tuple(row.tokens), tuple(row.logprobs), len(row.tokens)
        if row.end:
            tokens, logprobs = (*tokens, row.end[0]), (*logprobs, row.end[1])
        after, at = QUESTION, 0
        found: list[Segment] = []
        likely: list[dict[str, float]] = []
        while (at < len(tokens) and len(found) != request.segments) or not found:
            followers = [(name, *self._tags[name]) for name in self.tokens.legal(after)]
            written = (follower for follower in followers if tokens[at : at + len(follower[1])] == follower[1])
            tag, opening, closing = next(written, ("", (), ()))
            begin = at + len(opening)
            close = find(tokens[:last], closing, begin) if tag else None
            stop = len(tokens) if close is None else close + len(closing)
            if stop == last and self.tokens.terminal(tag):
                stop = len(tokens)
            text = self.text(tokens[begin : last if close is None else close])
            part, chosen = logprobs[at:stop], (int(Provenance.SAMPLED),) * (stop - at)
            found.append(Segment(tag, tokens[at:stop], part, chosen, text, close is not None, {}, self.version))
            likely.append({tag: math.exp(sum(part[: len(opening)]))})
            after, at = tag, stop
        segments = (replace(segment, priors=priors) for segment, priors in zip(found, [*likely[1:], {}], strict=True))
        return tuple(segments), likely[0]

    def _segment(self, request: Request, row: Row, begin: int, end: int) -> Segment:
        tokens = tuple(row.tokens[begin:end])
        first = Provenance.ARGMAX if request.sampling.boundary == "argmax" else Provenance.SAMPLED
        if begin == 0 and request.force:
            first = request.forced_as
        closed = tokens[-1] in self.closes
        return Segment(
            tag=self.vocabulary.names[self.vocabulary.opens.index(tokens[0])],
            tokens=tokens,
            logprobs=tuple(row.logprobs[begin:end]),
            provenance=(int(first), *[int(Provenance.SAMPLED)] * (len(tokens) - 1)),
            text=self.text(tokens[1:-1] if closed else tokens[1:]),
            closed=closed,
            priors=self._priors(row, end),
            version=self.version,
        )

    def _priors(self, row: Row, position: int) -> dict[str, float]:
        """Probabilities of the legal tags before the token at ``position``; empty where no tag may come."""
        if position not in row.tags:
            return {}
        probabilities = np.exp(row.tags[position]).tolist()
        return {tag: p for tag, p in zip(self.vocabulary.names, probabilities, strict=True) if p > 0.0}


@contextmanager
def _evaluating(modules: Sequence[Module]) -> Iterator[None]:
    """A model's modules without dropout; afterwards they are as they were."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def fingerprint(model: PreTrainedModel) -> str:
    """Tells apart two trainings in one folder: the first 8 digits of the :func:`digest` of all parameters."""
    return digest(model.parameters())[:8]


def digest(tensors: Iterable[Tensor]) -> str:
    """Hexadecimal digest (16 digits) of every bit of tensors on one device, the same on every device. They are summed where they
    are, some at a time: as words of eight bytes, and as these times their places."""
    sums = []
    for tensor in tensors:
        for part in tensor.detach().flatten().view(torch.uint8).split(CHUNK):
            words = pad(part, (0, -len(part) % 8)).view(torch.int64)
            places = torch.arange(1, len(words) + 1, device=words.device)
            sums.append(torch.stack([words.sum(), (words * places).sum()]))  # integers wrap around alike everywhere
    return hashlib.blake2b(torch.stack(sums).cpu().numpy().tobytes(), digest_size=8).hexdigest()
