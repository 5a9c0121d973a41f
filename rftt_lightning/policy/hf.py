"""The in-process backend: any Hugging Face causal LM, live weights, batched decoding under the grammar's mask.

Shape suffixes: B rows of the batch still decoding, L positions in the cache, V vocabulary, F functional tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from rftt_lightning.core.contracts import (
    Backend,
    Completion,
    Message,
    Provenance,
    Request,
    Segment,
    UserError,
)
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.vocab import Vocabulary, load, masked_log_softmax, plain_tokens


class HFBackend(Backend):
    """Decodes requests in batches of ``batch_size`` rows.

    Args:
        model: Hugging Face folder, ``pkg:`` path or hub name.
        tokens: functional-token table (YAML); None is the paper's.
        batch_size: rows decoded together.
        dtype: "auto" takes the checkpoint's; on CPU "float32" is usually fastest.
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
        self.name = model  # stores refuse to mix the trees of two models

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
        width = model.get_output_embeddings().weight.shape[0]
        known = tokenizer.get_vocab()
        self.vocabulary = Vocabulary(tokenizer, table, width, self.ends) if table.tags[0] in known else None
        free_V = plain_tokens(tokenizer, width)
        free_V[self.ends] = True
        self.allowed_SV = self.vocabulary.allowed_SV if self.vocabulary else free_V[None]
        self.limit = getattr(model.config, "max_position_embeddings", None) or 1 << 30
        self._chat = lru_cache(maxsize=1 << 16)(self._template)

    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self._chat(tuple(messages))

    def _template(self, messages: tuple[Message, ...]) -> tuple[int, ...]:
        turns = [message._asdict() for message in messages]
        return tuple(self.tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False))

    @torch.no_grad()
    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        self._check(requests)
        was_training = self.model.training
        self.model.eval()
        order = sorted(range(len(requests)), key=lambda i: len(requests[i].prompt))
        completions: dict[int, Completion] = {}
        for start in range(0, len(order), self.batch_size):
            rows = order[start : start + self.batch_size]
            batch = [requests[i] for i in rows]
            for i, row in zip(rows, _decode(self, batch), strict=True):
                completions[i] = self._completion(requests[i], row)
        self.model.train(was_training)
        return [completions[i] for i in range(len(requests))]

    def _check(self, requests: Sequence[Request]) -> None:
        if self.vocabulary is None and any(request.after is not None for request in requests):
            raise UserError(
                f"the model's tokenizer has no functional token {self.tokens.tags[0]}, so it cannot choose any; "
                "use an SFT model, or add them with `rftt tokens --model … --save …`"
            )
        longest = max((len(request.prompt) for request in requests), default=0)
        if longest >= self.limit:
            raise UserError(f"a context of {longest} tokens does not fit the model's {self.limit} positions; lower max_tokens")

    # -- from decoded rows to completions --------------------------------------------------------------------------------

    def _completion(self, request: Request, row: _Row) -> Completion:
        computed = len(request.prompt) + len(row.tokens)
        if request.after is None:
            tokens = tuple(row.tokens)
            chosen = (int(Provenance.SAMPLED),) * len(tokens)
            text = self._text(tokens)
            segment = Segment(request.force or "", tokens, tuple(row.logprobs), chosen, text, row.ended, {}, self.version)
            return Completion((segment,), {}, computed)
        segments, begin = [], 0
        for position, token in enumerate(row.tokens):
            closed = token in self.vocabulary.closes  # type: ignore[union-attr]
            if closed or position == len(row.tokens) - 1:
                segments.append(self._segment(request, row, begin, position + 1, closed))
                begin = position + 1
        return Completion(tuple(segments), self._priors(row, 0, request.after), computed)

    def _segment(self, request: Request, row: _Row, begin: int, end: int, closed: bool) -> Segment:
        tokens = tuple(row.tokens[begin:end])
        name = self.tokens.names[self.vocabulary.opens.index(tokens[0])]  # type: ignore[union-attr]
        first = Provenance.ARGMAX if request.sampling.boundary == "argmax" else Provenance.SAMPLED
        if begin == 0 and request.force:
            first = request.forced_as
        chosen = (int(first), *[int(Provenance.SAMPLED)] * (len(tokens) - 1))
        content = tokens[1:-1] if closed else tokens[1:]
        priors = self._priors(row, end, name) if closed else {}
        logprobs = tuple(row.logprobs[begin:end])
        return Segment(name, tokens, logprobs, chosen, self._text(content), closed, priors, self.version)

    def _priors(self, row: _Row, position: int, after: str) -> dict[str, float]:
        """Probabilities of the legal tags before the token at ``position``; empty where the model was not asked."""
        if position >= len(row.priors):
            return {}
        weights = {tag: row.priors[position][self.tokens.names.index(tag)] for tag in self.tokens.legal(after)}
        total = sum(weights.values())
        return {tag: weight / total for tag, weight in weights.items()}

    def _text(self, tokens: Sequence[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def _end_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that end the assistant's turn: the tokenizer's and all that the generation config names."""
    named = model.generation_config.eos_token_id if model.generation_config else None
    ids = [named] if isinstance(named, int) else list(named or [])
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


@dataclass
class _Row:
    """What decoding leaves of a request: tokens written, their log-probs, the weights [F] of the opening tags before each
    token (and before the one that was not written any more), and whether the model itself ended its turn."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    priors: list[list[float]] = field(default_factory=list)
    ended: bool = False


class _Settings:
    """The requests of a batch as tensors, one entry a row."""

    def __init__(self, requests: Sequence[Request], backend: HFBackend, device: torch.device) -> None:
        def row(values: list, dtype: torch.dtype = torch.long) -> Tensor:
            return torch.tensor(values, dtype=dtype, device=device)

        vocabulary = backend.vocabulary
        samplings = [request.sampling for request in requests]
        heat = row([s.temperature for s in samplings], torch.float)
        self.greedy = heat == 0
        self.temperature = torch.where(self.greedy, 1.0, heat)[:, None]  # greedy rows report the policy at temperature 1
        self.top_p = row([s.top_p for s in samplings], torch.float)[:, None]
        self.min_prior = row([s.min_prior for s in samplings], torch.float)[:, None]
        self.favourite = row([s.boundary == "argmax" for s in samplings], torch.bool)
        self.segment_budget = row([s.max_segment_tokens for s in samplings])
        room = [backend.limit - len(request.prompt) for request in requests]
        self.budget = row([min(r.max_tokens, left) for r, left in zip(requests, room, strict=True)])
        self.segments = row([request.segments or 1 << 40 for request in requests])
        self.seed = row([request.seed for request in requests])
        self.free = row([request.after is None for request in requests], torch.bool)
        self.state = row([0 if r.after is None else vocabulary.boundary(r.after) for r in requests])  # type: ignore[union-attr]
        forced = [r.after is not None and r.force is not None for r in requests]
        self.forced = row(
            [
                vocabulary.opens[vocabulary.names.index(r.force)] if f else -1  # type: ignore[union-attr, arg-type]
                for r, f in zip(requests, forced, strict=True)
            ]
        )

    def keep(self, rows: Tensor) -> None:
        for name, value in vars(self).items():
            setattr(self, name, value[rows])


def _decode(backend: HFBackend, requests: Sequence[Request]) -> list[_Row]:
    """Left-padded prefill, then one forward pass a token for all rows together; rows that end leave the batch."""
    device, vocabulary = backend.model.device, backend.vocabulary
    settings = _Settings(requests, backend, device)
    allowed_SV = backend.allowed_SV = backend.allowed_SV.to(device)
    input_BT, mask_BL = _pad(requests, backend.tokenizer.pad_token_id or 0, device)
    positions_BT = (mask_BL.cumsum(1) - 1).clamp(min=0)
    opens = torch.tensor(vocabulary.opens if vocabulary else [], dtype=torch.long, device=device)
    ends = torch.tensor(backend.ends, device=device)
    state_B, row_B = settings.state, torch.arange(len(requests), device=device)
    inside_B, closed_B = torch.zeros_like(row_B), torch.zeros_like(row_B)
    cache, trace, step = DynamicCache(), [], 0
    while True:
        logits_BV = backend.model(
            input_ids=input_BT,
            attention_mask=mask_BL,
            position_ids=positions_BT,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits[:, -1]
        logp_BV = masked_log_softmax(logits_BV, state_B, allowed_SV, settings.temperature)
        at_boundary_B = state_B > len(opens) if len(opens) else torch.zeros_like(settings.free)
        sampled_BV = _truncate(logp_BV, at_boundary_B, settings)
        token_B = _draw(sampled_BV, at_boundary_B, settings, step)
        from_BV = sampled_BV
        if step == 0:
            is_forced_B = settings.forced >= 0
            token_B = torch.where(is_forced_B, settings.forced, token_B)
            from_BV = torch.where(is_forced_B[:, None], logp_BV, sampled_BV)
        stopped_B = settings.free & torch.isin(token_B, ends)
        trace.append((row_B, token_B, from_BV.gather(1, token_B[:, None])[:, 0], logp_BV[:, opens].exp(), stopped_B))
        step += 1
        event_B = vocabulary.after_V.to(device)[token_B] if vocabulary else torch.full_like(token_B, -1)
        closes_B = event_B > len(opens)
        state_B = torch.where(event_B >= 0, event_B, state_B)
        inside_B = torch.where((event_B >= 0) & ~closes_B, 1, inside_B + 1)
        closed_B = closed_B + closes_B
        over_B = stopped_B | (settings.budget <= step) | (~closes_B & (inside_B >= settings.segment_budget))
        if vocabulary:
            over_B |= closes_B & (vocabulary.terminal_S.to(device)[state_B] | (closed_B >= settings.segments))
        if over_B.any():
            rest = (~over_B).nonzero()[:, 0]
            if not len(rest):
                return _rows(len(requests), trace)
            cache.batch_select_indices(rest)
            settings.keep(rest)
            row_B, token_B, state_B, inside_B, closed_B = (x[rest] for x in (row_B, token_B, state_B, inside_B, closed_B))
            mask_BL, positions_BT = mask_BL[rest], positions_BT[rest]
        input_BT, positions_BT = token_B[:, None], positions_BT[:, -1:] + 1
        mask_BL = torch.cat([mask_BL, mask_BL.new_ones(len(mask_BL), 1)], 1)


def _pad(requests: Sequence[Request], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Prompts padded on the left, and their attention mask, both [B, T]."""
    width = max(len(request.prompt) for request in requests)
    rows = [[pad] * (width - len(r.prompt)) + list(r.prompt) for r in requests]
    mask = [[0] * (width - len(r.prompt)) + [1] * len(r.prompt) for r in requests]
    return torch.tensor(rows, device=device), torch.tensor(mask, device=device)


def _truncate(logp_BV: Tensor, at_boundary_B: Tensor, settings: _Settings) -> Tensor:
    """The distribution that is really sampled from: improbable functional tokens pruned, contents cut to the top-p nucleus."""
    kept_BV = logp_BV
    if (settings.min_prior > 0).any():
        best = logp_BV.max(1, keepdim=True).values
        rare = (logp_BV < settings.min_prior.log()) & (logp_BV < best) & at_boundary_B[:, None]
        kept_BV = kept_BV.masked_fill(rare, -torch.inf)
    if (settings.top_p < 1).any():
        ordered, index = kept_BV.sort(1, descending=True)
        mass = ordered.softmax(1)
        outside = (mass.cumsum(1) - mass >= settings.top_p) & ~at_boundary_B[:, None]
        kept_BV = kept_BV.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), -torch.inf)
    return kept_BV if kept_BV is logp_BV else kept_BV.log_softmax(1)


def _draw(logp_BV: Tensor, at_boundary_B: Tensor, settings: _Settings, step: int) -> Tensor:
    """Tokens by inverse CDF from one uniform per (seed, step): a row's draws do not depend on the batch around it."""
    mass_BV = logp_BV.exp().double().cumsum(1)
    uniform_B = uniform(settings.seed, step) * mass_BV[:, -1]
    drawn_B = torch.searchsorted(mass_BV, uniform_B[:, None], right=True)[:, 0].clamp(max=logp_BV.shape[1] - 1)
    return torch.where(settings.greedy | (at_boundary_B & settings.favourite), logp_BV.argmax(1), drawn_B)


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


def _rows(count: int, trace: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]) -> list[_Row]:
    """Sort the steps' columns into rows."""
    rows = [_Row() for _ in range(count)]
    for step in trace:
        for row, token, logprob, priors, stopped in zip(*(column.tolist() for column in step), strict=True):
            rows[row].priors.append(priors)
            if stopped:
                rows[row].ended = True
            else:
                rows[row].tokens.append(token)
                rows[row].logprobs.append(logprob)
    return rows
