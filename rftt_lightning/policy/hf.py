"""The in-process backend: any Hugging Face causal LM, live weights, batched decoding under the grammar's mask.

Shape suffixes: B rows of the batch still decoding, L positions in the cache, V vocabulary, F functional tokens.
"""

from __future__ import annotations

import hashlib
import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import lru_cache

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import Cache, DynamicLayer, PreTrainedModel, PreTrainedTokenizerBase

from rftt_lightning.core.contracts import (
    QUESTION,
    Backend,
    Completion,
    Message,
    Provenance,
    Request,
    Sampling,
    Segment,
    UserError,
)
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.vocab import Vocabulary, load, masked_log_softmax

NOTHING = TokenTable((), {QUESTION: ()}, {QUESTION: ()})
"""The table of a model that knows no functional tokens."""


class HFBackend(Backend):
    """Decodes requests in batches of ``batch_size`` rows.

    Args:
        model: Hugging Face folder, ``pkg:`` path or hub name.
        tokens: functional-token table (YAML); None is the paper's.
        batch_size: rows decoded together.
        dtype: "auto" takes the checkpoint's on a GPU, and "float32" on the CPU, where it is usually fastest.
        device: "auto" is CUDA if there is one, else the CPU.
        attention: Transformers' attention implementation.
        mask: functional tokens that are never legal (masking verify and refine at inference, say).
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
    ) -> None:
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        if dtype == "auto" and device == "cpu":
            dtype = "float32"
        table = TokenTable.from_yaml(resolve(tokens) if tokens else None)
        for name in mask:
            if name not in table.names:
                raise UserError(f"backend.mask names {name!r}, which is not among the tokens {', '.join(table.names)}")
        self._bind(*load(model, dtype, attention, device), table.without(*mask), batch_size)
        precision = str(self.model.dtype).removeprefix("torch.")
        self.name = f"{model} {fingerprint(self.model)} {precision}"  # stores refuse to mix the trees of two models

    @classmethod
    def live(
        cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: TokenTable, batch_size: int = 128
    ) -> HFBackend:
        """A backend on a model that is being trained: every call decodes with the weights of that moment."""
        backend = cls.__new__(cls)
        backend._bind(model, tokenizer, table, batch_size)
        return backend

    def _bind(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: TokenTable, batch_size: int
    ) -> None:
        if batch_size < 1:
            raise UserError(f"backend.batch_size is {batch_size}; it must be at least 1")
        self.model, self.tokenizer, self.tokens, self.batch_size, self.version = model, tokenizer, table, batch_size, 0
        self.ends = _end_ids(model, tokenizer)
        width, known = model.get_output_embeddings().weight.shape[0], tokenizer.get_vocab()
        taught = any(tag in known for tag in table.tags)  # a base model writes free text only
        self.vocabulary = Vocabulary(tokenizer, table if taught else NOTHING, width, self.ends)
        self.closes = frozenset(self.vocabulary.closes)
        self.limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        self._chat = lru_cache(maxsize=1 << 16)(self._template)

    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self._chat(tuple(messages))

    def _template(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        turns = [message._asdict() for message in messages]
        try:
            ids = self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False)
        except (ValueError, TemplateError) as error:
            raise UserError(
                f"the tokenizer's chat template does not take these messages ({' '.join(str(error).split())[:200]}); "
                "use an instruct model, or set its chat_template"
            ) from error
        return tuple(ids)

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        for request in requests:
            self._check(request)
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        fitting = [i for i in order if len(requests[i].prompt) < self.limit]
        completions = {i: self._unwritten(requests[i]) for i in order[len(fitting) :]}
        with _evaluating(self.model):
            for start in range(0, len(fitting), self.batch_size):
                rows = fitting[start : start + self.batch_size]
                for i, row in zip(rows, _decode(self, [requests[i] for i in rows]), strict=True):
                    completions[i] = self._completion(requests[i], row)
        return [completions[i] for i in range(len(requests))]

    def _check(self, request: Request) -> None:
        if not request.prompt or request.max_tokens < 1:
            raise UserError("a request needs a prompt and max_tokens >= 1")
        if request.after is None:
            return
        if not self.vocabulary.names:
            raise UserError(
                f"the model's tokenizer has no functional token {self.tokens.tags[0]}, so it cannot choose any; "
                "use an SFT model, or add them with `rftt tokens --model … --save …`"
            )
        legal = self.tokens.legal(request.after)
        if not legal or (request.force and request.force not in legal):
            raise UserError(
                f"the grammar lets {', '.join(legal) or 'nothing'} follow {request.after!r}, not {request.force!r}; give the "
                "backend the table (and mask) that the requests were made with"
            )

    def _unwritten(self, request: Request) -> Completion:
        """The answer where the context leaves no room: a segment that is cut before its first token."""
        if request.after is not None and request.force is None:
            raise UserError(
                f"a question of {len(request.prompt)} tokens does not fit the model's {self.limit} positions; leave it out"
            )
        warnings.warn(
            f"a context of {len(request.prompt)} tokens fills the model's {self.limit} positions", stacklevel=2
        )
        return Completion((Segment(request.force or "", (), (), (), "", False, {}, self.version),))

    # -- from decoded rows to completions --------------------------------------------------------------------------------

    def _completion(self, request: Request, row: _Row) -> Completion:
        computed = len(request.prompt) + row.forwards - 1
        if request.after is None:
            tokens = tuple(row.tokens)
            chosen = (int(Provenance.SAMPLED),) * len(tokens)
            text = self._text(tokens)
            segment = Segment(
                request.force or "", tokens, tuple(row.logprobs), chosen, text, row.ended, {}, self.version
            )
            return Completion((segment,), {}, computed)
        ends = [i + 1 for i, token in enumerate(row.tokens) if token in self.closes]
        bounds = [0, *ends] if ends and ends[-1] == len(row.tokens) else [0, *ends, len(row.tokens)]
        segments = tuple(self._segment(request, row, begin, end) for begin, end in itertools.pairwise(bounds))
        return Completion(segments, self._priors(row, 0), computed)

    def _segment(self, request: Request, row: _Row, begin: int, end: int) -> Segment:
        tokens = tuple(row.tokens[begin:end])
        first = Provenance.ARGMAX if request.sampling.boundary == "argmax" else Provenance.SAMPLED
        if begin == 0 and request.force:
            first = request.forced_as
        closed = tokens[-1] in self.closes
        return Segment(
            tag=self.tokens.names[self.vocabulary.opens.index(tokens[0])],
            tokens=tokens,
            logprobs=tuple(row.logprobs[begin:end]),
            provenance=(int(first), *[int(Provenance.SAMPLED)] * (len(tokens) - 1)),
            text=self._text(tokens[1:-1] if closed else tokens[1:]),
            closed=closed,
            priors=self._priors(row, end),
            version=self.version,
        )

    def _priors(self, row: _Row, position: int) -> dict[str, float]:
        """Probabilities of the legal tags before the token at ``position``; empty where no tag may come."""
        return {tag: p for tag, p in zip(self.tokens.names, row.priors.get(position, ()), strict=False) if p > 0.0}

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model without dropout; afterwards it is as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def fingerprint(model: PreTrainedModel) -> str:
    """Tells apart two trainings in one folder: a digest of the first numbers of every tensor."""
    heads = (p.detach().flatten()[:16].float().cpu().numpy().tobytes() for p in model.parameters())
    return hashlib.blake2b(b"".join(heads), digest_size=4).hexdigest()


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end the assistant's turn: the tokenizer's and all that the generation config names."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    ids = [named] if isinstance(named, int) else list(named or [])
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


@dataclass
class _Row:
    """What decoding leaves of a request: tokens written and their log-probs; by position, the probabilities [F] of the opening
    tags where one could come; how often it went through the model; whether the model itself ended its turn."""

    tokens: list[int]
    logprobs: list[float]
    priors: dict[int, list[float]] = field(default_factory=dict)
    forwards: int = 0
    ended: bool = False


@dataclass
class _Rows:
    """The rows that are still decoding, one entry each in every tensor: what their requests ask, then where they are."""

    number_B: Tensor  # of the request
    seed_B: Tensor
    temperature_B1: Tensor
    top_p_B1: Tensor
    min_prior_B1: Tensor
    greedy_B: Tensor
    favourite_B: Tensor  # follow the favourite functional token
    forced_B: Tensor  # first token, -1 if the model chooses
    free_B: Tensor
    budget_B: Tensor
    segment_budget_B: Tensor
    segments_B: Tensor
    state_B: Tensor  # of the grammar, before the next token
    inside_B: Tensor  # tokens of the segment so far
    closed_B: Tensor  # segments closed so far
    final_B: Tensor  # all is written; in the batch only for the priors after it

    @classmethod
    def of(cls, requests: Sequence[Request], vocabulary: Vocabulary, limit: int, device: torch.device) -> _Rows:
        def column(values: list, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        samplings = [request.sampling for request in requests]
        heat_B1 = column([[s.temperature] for s in samplings], torch.float)
        zero_B = column([0] * len(requests))
        return cls(
            number_B=torch.arange(len(requests), device=device),
            seed_B=column([_wrap(r.seed) for r in requests]),
            temperature_B1=torch.where(heat_B1 == 0, 1.0, heat_B1),  # greedy rows report the policy at temperature 1
            top_p_B1=column([[s.top_p] for s in samplings], torch.float),
            min_prior_B1=column([[s.min_prior] for s in samplings], torch.float),
            greedy_B=heat_B1[:, 0] == 0,
            favourite_B=column([s.boundary == "argmax" for s in samplings], torch.bool),
            forced_B=column([_forced(r, vocabulary) for r in requests]),
            free_B=column([r.after is None for r in requests], torch.bool),
            budget_B=column([min(r.max_tokens, limit - len(r.prompt)) for r in requests]),
            segment_budget_B=column([s.max_segment_tokens for s in samplings]),
            segments_B=column([r.segments or 1 << 40 for r in requests]),
            state_B=column([0 if r.after is None else vocabulary.boundary(r.after) for r in requests]),
            inside_B=zero_B,
            closed_B=zero_B,
            final_B=zero_B.bool(),
        )

    def keep(self, index: Tensor) -> None:
        for entry in fields(self):
            setattr(self, entry.name, getattr(self, entry.name)[index])


def _forced(request: Request, vocabulary: Vocabulary) -> int:
    if request.after is None or request.force is None:
        return -1
    return vocabulary.opens[vocabulary.names.index(request.force)]


class _Layer(DynamicLayer):
    """A layer's keys and values with room kept free ahead. Transformers' own copies all of them for every token, which takes
    three quarters of the time of a small model; here a step writes its column, and rows that leave give their place to
    the last ones."""

    AHEAD = 64
    room: tuple[Tensor, Tensor]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = key_states[:, :, :0], value_states[:, :, :0]
        begin = self.get_seq_length()
        self.room = self._write(self.room[0], key_states, begin), self._write(self.room[1], value_states, begin)
        self.keys, self.values = (room[:, :, : begin + key_states.shape[2]] for room in self.room)
        return self.keys, self.values

    def _write(self, room: Tensor, states: Tensor, begin: int) -> Tensor:
        end = begin + states.shape[2]
        if end > room.shape[2]:
            batch, heads, _, width = states.shape
            larger = states.new_empty(batch, heads, end + self.AHEAD, width)
            larger[:, :, :begin] = room[:, :, :begin]
            room = larger
        room[:, :, begin:end] = states
        return room

    def batch_select_indices(self, indices: Tensor) -> None:
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero()[:, 0]
        begin = self.get_seq_length()
        for room in self.room:
            room[moved, :, :begin] = room[indices[moved], :, :begin]
        self.room = self.room[0][: len(indices)], self.room[1][: len(indices)]
        self.keys, self.values = (room[:, :, :begin] for room in self.room)


def _decode(backend: HFBackend, requests: Sequence[Request]) -> list[_Row]:
    """Left-padded prefill, then one forward pass a token for all rows together; rows that end leave the batch."""
    device = backend.model.device
    vocabulary = backend.vocabulary.to(device)
    truncated = _Truncated.of([request.sampling for request in requests])
    opens, ends = (torch.tensor(ids, dtype=torch.long, device=device) for ids in (vocabulary.opens, backend.ends))
    rows = _Rows.of(requests, vocabulary, backend.limit, device)
    input_BT, mask_BL = _pad(requests, backend.tokenizer.pad_token_id or 0, device)
    positions_BT = (mask_BL.cumsum(1) - 1).clamp(min=0)
    cache, trace = Cache(layer_class_to_replicate=_Layer), []
    for step in itertools.count():
        logits_BV = backend.model(
            input_ids=input_BT,
            attention_mask=mask_BL,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        logp_BV = masked_log_softmax(logits_BV, rows.state_B, vocabulary.allowed_SV, rows.temperature_B1)
        boundary_B = rows.state_B > len(opens)
        token_B, logprob_B = _choose(logp_BV, boundary_B, rows, truncated, step)
        stopped_B = rows.free_B & torch.isin(token_B, ends)
        written_B = ~(stopped_B | rows.final_B)
        trace.append((rows.number_B, token_B, logprob_B, written_B, boundary_B, logp_BV[:, opens].exp()))
        done_B = ~written_B | _advance(rows, token_B, vocabulary, step + 1)
        input_BT, positions_BT = token_B[:, None], positions_BT[:, -1:] + 1
        if done_B.any():
            rest = _rest(done_B)
            if not len(rest):
                break
            cache.batch_select_indices(rest)
            rows.keep(rest)
            input_BT, positions_BT, mask_BL = input_BT[rest], positions_BT[rest], mask_BL[rest]
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), 1)], 1)
    return _collect(trace, requests)


def _advance(rows: _Rows, token_B: Tensor, vocabulary: Vocabulary, length: int) -> Tensor:
    """Take in the token that was written, the ``length``-th; returns which rows have nothing left to ask [B]."""
    event_B = vocabulary.after_V[token_B]
    closes_B = event_B > len(vocabulary.names)
    rows.state_B = torch.where(event_B >= 0, event_B, rows.state_B)
    rows.inside_B = torch.where((event_B >= 0) & ~closes_B, 1, rows.inside_B + 1)
    rows.closed_B = rows.closed_B + closes_B
    spent_B = length >= rows.budget_B
    rows.final_B = closes_B & (spent_B | (rows.closed_B >= rows.segments_B))
    cut_B = ~closes_B & (spent_B | (rows.inside_B >= rows.segment_budget_B))
    return cut_B | (closes_B & vocabulary.terminal_S[rows.state_B])


def _rest(done_B: Tensor) -> Tensor:
    """Index of the rows that stay, of which as few as possible change their place: the last ones fill the gaps."""
    stay = (~done_B).nonzero()[:, 0]
    index = torch.arange(len(stay), device=done_B.device)
    index[done_B[: len(stay)]] = stay[stay >= len(stay)]
    return index


def _pad(requests: Sequence[Request], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, and their attention mask, both [B, T]."""
    width = max(len(request.prompt) for request in requests)
    rows = [[pad] * (width - len(r.prompt)) + list(r.prompt) for r in requests]
    mask = [[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in requests]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


@dataclass(frozen=True)
class _Truncated:
    """Which truncations any row of the batch asks for; the others are not computed."""

    prior: bool
    top_p: bool
    drawn: bool

    @classmethod
    def of(cls, samplings: Sequence[Sampling]) -> _Truncated:
        return cls(
            any(s.min_prior > 0 for s in samplings),
            any(s.top_p < 1 for s in samplings),
            any(s.temperature > 0 for s in samplings),
        )


def _choose(logp_BV: Tensor, boundary_B: Tensor, rows: _Rows, asked: _Truncated, step: int) -> tuple[Tensor, Tensor]:
    """Next tokens [B], and their log-probs under the distribution they come from."""
    kept_BV = _truncate(logp_BV, boundary_B, rows, asked)
    token_B = kept_BV.argmax(1)
    if asked.drawn:
        token_B = torch.where(
            rows.greedy_B | (boundary_B & rows.favourite_B), token_B, _draw(kept_BV, rows.seed_B, step)
        )
    logprob_B = kept_BV.gather(1, token_B[:, None])[:, 0]
    if step == 0:
        forced_B = rows.forced_B >= 0
        token_B = torch.where(forced_B, rows.forced_B, token_B)
        logprob_B = torch.where(forced_B, logp_BV.gather(1, token_B[:, None])[:, 0], logprob_B)
    return token_B, logprob_B


def _truncate(logp_BV: Tensor, boundary_B: Tensor, rows: _Rows, asked: _Truncated) -> Tensor:
    """The distribution that is really sampled from: improbable functional tokens pruned, contents cut to the top-p nucleus."""
    kept_BV = logp_BV
    if asked.prior:
        best = logp_BV.max(1, keepdim=True).values
        rare = (logp_BV < rows.min_prior_B1.log()) & (logp_BV < best) & boundary_B[:, None]
        kept_BV = kept_BV.masked_fill(rare, -torch.inf)
    if asked.top_p:
        ordered, index = kept_BV.sort(1, descending=True)
        mass = ordered.exp()
        outside = (mass.cumsum(1) - mass >= rows.top_p_B1) & ~boundary_B[:, None]
        kept_BV = kept_BV.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), -torch.inf)
    return kept_BV if kept_BV is logp_BV else kept_BV.log_softmax(1)


def _draw(logp_BV: Tensor, seed_B: Tensor, step: int) -> Tensor:
    """Tokens by inverse CDF from one uniform per (seed, step): a row's draws do not depend on the batch around it."""
    mass_BV = logp_BV.exp().double().cumsum(1)
    uniform_B = uniform(seed_B, step) * mass_BV[:, -1]
    return torch.searchsorted(mass_BV, uniform_B[:, None], right=True)[:, 0].clamp(max=logp_BV.shape[1] - 1)


def uniform(seed_B: Tensor, step: int) -> Tensor:
    """Uniform numbers in [0, 1), float64, by SplitMix64 (Steele et al. 2014) of (seed, step) in wrapping int64 arithmetic."""
    z = seed_B + _wrap(0x9E3779B97F4A7C15 * (step + 1))
    z = (z ^ _shift(z, 30)) * _wrap(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _wrap(0x94D049BB133111EB)
    return _shift(z ^ _shift(z, 31), 11).double() * 2.0**-53


def _wrap(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> by) & ((1 << (64 - by)) - 1)


def _collect(trace: Sequence[tuple[Tensor, ...]], requests: Sequence[Request]) -> list[_Row]:
    """Sort the steps' columns (request, token, log-prob, written, boundary, priors) into rows."""
    number, token, logprob, written, boundary, priors = (torch.cat(column).cpu() for column in zip(*trace, strict=True))
    order = number.argsort(stable=True)
    counts = torch.bincount(number, minlength=len(requests)).tolist()
    columns = [column[order].split(counts) for column in (token, logprob, written, boundary, priors)]
    rows = []
    for request, token, logprob, written, boundary, priors in zip(requests, *columns, strict=True):
        row = _Row(token[written].tolist(), logprob[written].tolist(), forwards=len(token))
        places = boundary.nonzero()[:, 0]
        row.priors = dict(zip(places.tolist(), priors[places].tolist(), strict=True))
        row.ended = request.after is None and not bool(written[-1])
        rows.append(row)
    return rows
