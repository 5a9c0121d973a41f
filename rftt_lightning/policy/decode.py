"""Decoding many requests at once: rows join and leave a batch in which every forward pass writes one token a row.

A request's known beginning is copied from the :class:`PrefixCache`, what is new of its prompt is read, and from then on it
is a row like the others. What it has read goes back to the cache when it leaves.

Shape suffixes: B rows of the batch, T tokens of one forward pass, L columns of keys and values, V vocabulary, F functional
tokens; Y layers, H heads, D head width.
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor
from transformers import Cache, DynamicLayer, PreTrainedModel

from rftt_lightning.core.contracts import Finish, Request, Usage, UserError
from rftt_lightning.policy.prefix import PrefixCache
from rftt_lightning.policy.vocab import Vocabulary, masked_log_softmax

AHEAD = 64
"""Columns that are kept free for the tokens to come."""

COMPANY = 1 / 8, 32
"""Prompts wait to be read together until they are this share of the batch, or so many steps have gone since the last ones were."""

PADDING = 0.1
"""Prompts are read together as long as their padding adds no more than this share of them, or no more positions than a step has."""

ROW = np.dtype(
    [
        ("seed", np.int64),
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("min_prior", np.float32),
        ("greedy", np.bool_),
        ("favourite", np.bool_),  # follow the favourite functional token
        ("force", np.int64),  # the first token's number among the functional ones, -1 if the model chooses
        ("free", np.bool_),  # free text
        ("budget", np.int64),
        ("segment_budget", np.int64),
        ("segments", np.int64),
        ("token", np.int64),  # the one that the next forward pass reads
        ("length", np.int64),  # positions that were read
        ("state", np.int64),  # of the grammar, before the token to be chosen
        ("inside", np.int64),  # tokens of the segment so far
        ("closed", np.int64),  # segments closed so far
        ("written", np.int64),  # tokens written so far
        ("final", np.bool_),  # all is written; under way only for the priors after it
        ("computed", np.int64),
    ]
)
"""What a row asks for, and how far it is."""


@dataclass
class Row:
    """What decoding leaves of a request: tokens written and their log-probs; by position, the log-probabilities [F] of the opening
    tags where one could come; positions that went through the model for it; the end of turn, which is none of the tokens, and
    its log-prob."""

    tokens: list[int]
    logprobs: list[float]
    tags: dict[int, np.ndarray] = field(default_factory=dict)
    computed: int = 0
    finish: Finish = Finish.STOP
    end: tuple[int, float] | None = None


@dataclass(frozen=True)
class _Entry:
    """A request that waits, with the slots of its known beginning."""

    number: int
    request: Request
    slots: np.ndarray
    tags: np.ndarray | None  # log-probabilities of the opening tags after the prompt, if it is known as a whole

    @property
    def unread(self) -> int:
        """Tokens that must be read before the next one is chosen."""
        return 1 if self.tags is not None else len(self.request.prompt) - len(self.slots)


class _Layer(DynamicLayer):
    """One layer's view of the batch's keys and values."""

    def __init__(self, room: _Room, index: int) -> None:
        super().__init__()
        self.room, self.index, self.is_initialized = room, index, True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: object, **kwargs: object
    ) -> tuple[Tensor, Tensor]:
        return self.room.write(self.index, key_states, value_states)

    def get_seq_length(self) -> int:
        return self.room.begin - self.room.low


class _Room:
    """Keys and values of all rows, [Y, B, H, L, D]. Every row ends at column ``end``, wherever it began: so a forward pass
    writes one block, and the distance of columns is that of positions."""

    def __init__(self, layers: int) -> None:
        self.cache = Cache(layers=[_Layer(self, index) for index in range(layers)])
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self.rows, self.columns, self.end = 0, 0, 0
        self.low = self.begin = 0  # columns that the present forward pass sees, and at which it begins to write
        self.window = slice(0, 0)  # its rows

    @property
    def bytes(self) -> int:
        return sum(room.numel() * room.element_size() for room in (self.keys, self.values) if room is not None)

    def write(self, layer: int, keys_BHTD: Tensor, values_BHTD: Tensor) -> tuple[Tensor, Tensor]:
        if self.keys is None or self.values is None:
            self.keys, self.values = (self._new(like, like.shape[1]) for like in (keys_BHTD, values_BHTD))
        end = self.begin + keys_BHTD.shape[2]
        for room, states in ((self.keys, keys_BHTD), (self.values, values_BHTD)):
            room[layer, self.window, :, self.begin : end] = states
        return self.keys[layer, self.window, :, self.low : end], self.values[layer, self.window, :, self.low : end]

    def _new(self, like: Tensor, heads: int) -> Tensor:
        # Zeros: what is masked takes part with weight 0, which does not undo a NaN.
        return like.new_zeros(len(self.cache.layers), self.rows, heads, self.columns, like.shape[-1])

    def reserve(self, rows: int, longest: int, kept: int, width: int) -> None:
        """Make room for ``rows`` rows, one as long as ``longest``, and a column more; of the first ``kept`` rows the last
        ``width`` columns are kept."""
        if rows <= self.rows and self.end >= longest and self.end < self.columns:
            return
        end = max(longest, width)
        larger = rows > self.rows or end + AHEAD // 2 > self.columns
        if larger:
            self.rows, self.columns = max(rows, self.rows), end + max(AHEAD, end // 4)
        for name in ("keys", "values"):  # one after the other, so that only one of them is there twice
            if (old := getattr(self, name)) is not None:
                states = old[:, :kept, :, self.end - width : self.end]
                new = self._new(old, old.shape[2]) if larger else old
                new[:, :kept, :, end - width : end] = states if larger else states.clone()
                setattr(self, name, new)
        self.end = end

    def move(self, to: np.ndarray, rows: np.ndarray, width: int) -> None:
        """Put ``rows`` in the places ``to``."""
        for room in (self.keys, self.values):
            if room is not None:
                where, what = (torch.from_numpy(index).to(room.device) for index in (to, rows))
                for layer in room[:, :, :, self.end - width : self.end]:  # one at a time: what is copied is there twice
                    layer[where] = layer[what]

    def copy(self, pool: PrefixCache, slots: np.ndarray, row: int, column: int, back: bool) -> None:
        """Take a row's positions from ``column`` on from the pool's slots; ``back``: put them there. Slots mostly follow each
        other; runs of them are copied as they lie, several times faster than by their numbers."""
        assert pool.keys_YHND is not None and pool.values_YHND is not None
        if self.keys is None or self.values is None:
            self.keys, self.values = (self._new(like, like.shape[1]) for like in (pool.keys_YHND, pool.values_YHND))
        begin = 0
        for end in (*(np.flatnonzero(np.diff(slots) != 1) + 1).tolist(), len(slots)):
            first, span = int(slots[begin]), slice(column + begin, column + end)
            for room, store in ((self.keys, pool.keys_YHND), (self.values, pool.values_YHND)):
                here, there = room[:, row, :, span], store[:, :, first : first + end - begin]
                there.copy_(here) if back else here.copy_(there)
            begin = end


class Batch:
    """At most ``size`` requests under way on a model. :meth:`admit` lets requests in, :meth:`step` writes one token a row."""

    def __init__(
        self,
        model: PreTrainedModel,
        vocabulary: Vocabulary,
        ends: Sequence[int],
        limit: int,
        size: int,
        prefixes: PrefixCache,
        usage: Usage,
    ) -> None:
        self.model, self.vocabulary, self.limit, self.size = model, vocabulary.to(model.device), limit, size
        self.prefixes, self.usage = prefixes, usage
        self.opens = torch.tensor(vocabulary.opens, dtype=torch.long, device=model.device)
        self.opens_F, self.ends = np.array(vocabulary.opens, np.int64), np.array(ends, np.int64)
        self.after_V, self.terminal_S = vocabulary.after_V.cpu().numpy(), vocabulary.terminal_S.cpu().numpy()
        self.room = _Room(model.config.get_text_config().num_hidden_layers)
        self.rows = np.zeros(size, ROW)
        self.requests: list[tuple[int, Request] | None] = []  # with their numbers, in the rows' order; None is a gap
        self.gaps: list[int] = []
        self.written = np.zeros((size, AHEAD, 2 + len(self.opens)), np.float32)  # token, log-prob, tags' log-probs [F]
        self.waiting: deque[tuple[int, Request]] = deque()
        self.cold: list[tuple[int, Request]] = []  # those whose prompts wait to be read together
        self.last_read = usage.steps
        self.draws: _Draws | None = None

    def __len__(self) -> int:
        return len(self.requests) - len(self.gaps)

    # -- rows that join --------------------------------------------------------------------------------------------------

    def admit(self, more: Callable[[int], Sequence[tuple[int, Request]]]) -> bool:
        """Let requests join while there is room; False if ``more`` has too few to fill it. A request whose prompt is known joins
        as it is; the others' prompts wait for :data:`COMPANY`, unless nothing else can be done."""
        free = self.size - len(self)
        if len(self.waiting) < free:
            self.waiting.extend(more(free - len(self.waiting)))
        full = len(self.waiting) >= free
        warm: list[_Entry] = []
        while self.waiting and len(warm) < free and len(self.cold) < self.size:
            entry = self._entry(*self.waiting.popleft())
            if entry.unread == 1:
                warm.append(entry)
            else:
                self.cold.append((entry.number, entry.request))
        share, steps = COMPANY
        ripe = not full or len(self.cold) >= share * self.size or self.usage.steps >= self.last_read + steps
        read, self.cold = (self.cold[:free], self.cold[free:]) if ripe else ([], self.cold)
        free -= len(read)
        self.waiting.extendleft((entry.number, entry.request) for entry in reversed(warm[free:]))
        if free and warm:
            self._place(warm[:free])
        if read:
            self.last_read = self.usage.steps
            self._close_up()
            for part in self._order(read):
                # What was known when they came may have been given up since, and more may be known.
                entries = sorted((self._entry(*item) for item in part), key=lambda entry: entry.unread)
                self._place(entries)
                self._read(entries)
        return full

    def _order(self, read: list[tuple[int, Request]]) -> Iterator[list[tuple[int, Request]]]:
        """Requests whose prompts are to be read, in parts, so that what they share is read once: the first of all goes alone
        (a system prompt, examples), then one of each prompt, then those whose prompts are known by then."""
        if self.prefixes.fresh:
            yield read[:1]
            read = read[1:]
        first = {request.prompt: number for number, request in reversed(read)} if self.prefixes.capacity else {}
        again = [item for item in read if first.get(item[1].prompt, item[0]) != item[0]]
        yield from (part for part in ([item for item in read if item not in again], again) if part)

    def _entry(self, number: int, request: Request) -> _Entry:
        prompt, tags = request.prompt, None
        slots = self.prefixes.match(prompt)
        if len(slots) == len(prompt):
            # Its forced token is taken as written, and another one follows: there must be room for both.
            room = min(request.max_tokens, self.limit - len(prompt), request.sampling.max_segment_tokens)
            if request.after is not None and request.force is not None and room > 1:
                tags = self.prefixes.tags(prompt, request.sampling.temperature)
            if tags is None:
                slots = slots[:-1]  # its last token is read again, for what may follow it
        return _Entry(number, request, slots, tags)

    def _place(self, entries: Sequence[_Entry]) -> None:
        """Make rows of requests, with what is known of them in place."""
        lengths = [len(e.request.prompt) - (e.tags is None) for e in entries]
        places, self.gaps = self.gaps[: len(entries)], self.gaps[len(entries) :]
        more = len(entries) - len(places)
        places += range(len(self.requests), len(self.requests) + more)
        kept = len(self.requests)
        self.requests += [None] * more
        self._reserve(len(self.requests), max(lengths), kept)
        for place, entry, length in zip(places, entries, lengths, strict=True):
            self._begin(place, entry, length)
        self.draws = None
        with self._timed("copy"):
            for place, entry, length in zip(places, entries, lengths, strict=True):
                if len(entry.slots):
                    self.usage.reused += len(entry.slots)
                    self.room.copy(self.prefixes, entry.slots, place, self.room.end - length, back=False)

    def _reserve(self, rows: int, longest: int, kept: int) -> None:
        if rows > self.room.rows:
            rows = min(max(rows, 2 * self.room.rows), self.size)
        with self._timed("copy"):
            self.room.reserve(rows, longest, kept, int(self.rows["length"][:kept].max(initial=0)))
        self._weigh()

    def _weigh(self) -> None:
        self.usage.cache_bytes = max(self.usage.cache_bytes, self.room.bytes + self.prefixes.bytes)

    def _begin(self, place: int, entry: _Entry, length: int) -> None:
        request, sampling, vocabulary = entry.request, entry.request.sampling, self.vocabulary
        free = request.after is None
        force = -1 if free or request.force is None else vocabulary.names.index(request.force)
        self.requests[place] = entry.number, request
        state = 0 if request.after is None else vocabulary.boundary(request.after)
        token, written = request.prompt[-1], 0
        if entry.tags is not None:  # the forced token is there without a forward pass
            self.written[place, 0, :2] = self.opens_F[force], entry.tags[force]
            self.written[place, 0, 2:] = entry.tags
            token, state, written, force = self.opens_F[force], 1 + force, 1, -1
        self.rows[place] = (
            _wrap(request.seed),
            sampling.temperature or 1.0,  # greedy rows report the policy at temperature 1
            sampling.top_p,
            sampling.min_prior,
            sampling.temperature == 0,
            sampling.boundary == "argmax",
            force,
            free,
            min(request.max_tokens, self.limit - len(request.prompt)),
            sampling.max_segment_tokens,
            request.segments or 1 << 40,
            token,
            length,
            state,
            written,  # inside
            0,
            written,
            False,
            0,
        )

    def _read(self, entries: Sequence[_Entry]) -> None:
        """Read what is new of the prompts of the last rows, all but their last tokens; shortest first."""
        first, begin = len(self) - len(entries), 0
        unread = [entry.unread - 1 for entry in entries]
        for end in range(1, len(entries) + 1):
            real = sum(unread[begin : end + 1])
            if end == len(entries) or unread[end] * (end + 1 - begin) - real > max(PADDING * real, self.size):
                if unread[end - 1]:
                    self._read_together(entries[begin:end], first + begin, unread[end - 1])
                begin = end
        self._remember(range(first, first + len(entries)))

    def _read_together(self, entries: Sequence[_Entry], first: int, count: int) -> None:
        prompts = [entry.request.prompt[:-1][-count:] for entry in entries]
        ids_BT = torch.tensor([[prompt[0]] * (count - len(prompt)) + list(prompt) for prompt in prompts])
        self._forward(slice(first, first + len(entries)), ids_BT, self.room.end - count)
        self.rows["computed"][first : first + len(entries)] += count

    # -- a forward pass --------------------------------------------------------------------------------------------------

    def _forward(self, window: slice, ids_BT: Tensor, begin: int) -> Tensor:
        """Logits [B, V] after the last tokens of the rows ``window``, which are written from column ``begin`` on."""
        room, device = self.room, self.model.device
        end, start_B = begin + ids_BT.shape[1], room.end - self.rows["length"][window]
        room.window, room.begin, room.low = window, begin, min(int(start_B.min()), begin)
        start_B1 = torch.from_numpy(start_B).to(device)[:, None]
        columns_L = torch.arange(room.low, end, device=device)
        positions_BT = (columns_L[begin - room.low :] - start_B1).clamp(min=0)
        with self._timed("model"):
            output = self.model(
                input_ids=ids_BT.to(device),
                attention_mask=(columns_L >= start_B1).long(),
                position_ids=positions_BT,
                past_key_values=room.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        self.usage.calls += 1
        if room.keys is None or room.values is None:
            raise UserError(f"{type(self.model).__name__} keeps no keys and values; use a model with a standard cache")
        if self.prefixes.budget:
            self.prefixes.shape(room.keys, room.values)
        self.usage.position_bytes = room.bytes // (room.rows * room.columns)
        return output.logits[:, -1]

    def step(self) -> list[tuple[int, Request, Row]]:
        """Read one token a row and choose the next; returns (number, request, row) of those that leave."""
        self._close_up()
        count, device = len(self), self.model.device
        self._reserve(count, 0, count)
        rows = self.rows[:count]
        logits_BV = self._forward(slice(0, count), torch.from_numpy(rows["token"].copy())[:, None], self.room.end)
        self.room.end += 1
        rows["length"] += 1
        rows["computed"] += 1
        with self._timed("choose"):
            self.draws = self.draws or _Draws.of(rows, device)
            state_B, written_B = (torch.from_numpy(rows[name].copy()).to(device) for name in ("state", "written"))
            logp_BV = masked_log_softmax(logits_BV, state_B, self.vocabulary.allowed_SV, self.draws.temperature_B1)
            token_B, logprob_B = _choose(logp_BV, state_B > len(self.opens), self.draws, written_B)
            columns = [token_B[:, None].float(), logprob_B[:, None], logp_BV[:, self.opens]]
            found = torch.cat(columns, 1).cpu().numpy()
        self.usage.steps += 1
        self.usage.rows += count
        return self._leave(self._advance(rows, found).nonzero()[0].tolist())

    def _advance(self, rows: np.ndarray, found: np.ndarray) -> np.ndarray:
        """Take in the tokens that were chosen; returns which rows have nothing left to ask [B]."""
        forced = (rows["force"] >= 0).nonzero()[0]
        force = rows["force"][forced]
        found[forced, 0], found[forced, 1] = self.opens_F[force], found[forced, 2 + force]
        rows["force"][forced] = -1
        token = found[:, 0].astype(np.int64)
        if rows["written"].max() >= self.written.shape[1]:
            self.written = np.concatenate([self.written, np.zeros_like(self.written)], 1)
        self.written[np.arange(len(rows)), rows["written"]] = found
        over = rows["final"].copy()
        if rows["free"].any():
            over |= rows["free"] & np.isin(token, self.ends)
        event = self.after_V[token]
        closes = event > len(self.opens)
        rows["token"] = token
        rows["written"] += ~over
        rows["state"] = np.where(event >= 0, event, rows["state"])
        rows["inside"] = np.where((event >= 0) & ~closes, 1, rows["inside"] + 1)
        rows["closed"] += closes
        ends = closes & self.terminal_S[rows["state"]]
        spent = rows["written"] >= rows["budget"]
        rows["final"] |= closes & ~ends & (spent | (rows["closed"] >= rows["segments"]))
        cut = ~closes & (spent | (rows["inside"] >= rows["segment_budget"]))
        return over | ends | cut

    # -- rows that leave -------------------------------------------------------------------------------------------------

    def _leave(self, places: list[int]) -> list[tuple[int, Request, Row]]:
        leaving = [(*self._request(place), self._row(place)) for place in places]
        self._remember(places, [row for _, _, row in leaving])
        for place in places:
            self.requests[place] = None
        self.rows["length"][places] = 0
        self.gaps += places
        return leaving

    def _request(self, place: int) -> tuple[int, Request]:
        entry = self.requests[place]
        assert entry is not None, "a gap"
        return entry

    def _row(self, place: int) -> Row:
        _, request = self._request(place)
        state, written = self.rows[place], self.written[place]
        count = int(state["written"])
        tokens = written[:count, 0].astype(np.int64).tolist()
        opening = np.isin(written[:count, 0], self.opens_F)
        places = [] if state["free"] else opening.nonzero()[0].tolist()
        if state["final"]:
            places.append(count)
        finish = self._finish(request, state)
        ended = state["free"] and finish is Finish.STOP
        return Row(
            tokens,
            written[:count, 1].tolist(),
            {i: written[i, 2:].copy() for i in places},
            int(state["computed"]),
            finish,
            (int(state["token"]), float(written[count, 1])) if ended else None,
        )

    def _finish(self, request: Request, state: np.void) -> Finish:
        if state["free"] and int(state["token"]) in self.ends or self.terminal_S[state["state"]]:
            return Finish.STOP
        if state["closed"] >= state["segments"]:
            return Finish.STOP
        if state["written"] >= state["budget"]:
            return Finish.LENGTH if state["budget"] == request.max_tokens else Finish.CONTEXT
        return Finish.SEGMENT

    def _remember(self, places: Sequence[int], rows: Sequence[Row] = ()) -> None:
        """Give to the cache what rows have read and it does not know."""
        if not self.prefixes.budget:
            return
        for place, row in itertools.zip_longest(places, rows):
            _, request = self._request(place)
            tokens, tags, length = request.prompt, {}, int(self.rows["length"][place])
            if row is not None:
                tokens += tuple(row.tokens)
                tags = {len(request.prompt) + i: logp_F for i, logp_F in row.tags.items()}
            slots = self.prefixes.insert(tokens[:length], tags, request.sampling.temperature)
            if len(slots):
                with self._timed("copy"):
                    self.room.copy(self.prefixes, slots, place, self.room.end - len(slots), back=True)
        self._weigh()

    def _close_up(self) -> None:
        """Fill the gaps that are left with the last rows."""
        if not self.gaps:
            return
        count = len(self)
        gaps = [place for place in self.gaps if place < count]
        rows = [place for place in range(count, len(self.requests)) if self.requests[place] is not None]
        if gaps:
            with self._timed("copy"):
                self.room.move(np.array(gaps), np.array(rows), int(self.rows["length"].max()))
            self.rows[gaps], self.written[gaps] = self.rows[rows], self.written[rows]
            for gap, place in zip(gaps, rows, strict=True):
                self.requests[gap] = self.requests[place]
        self.rows["length"][count:] = 0
        self.requests, self.gaps, self.draws = self.requests[:count], [], None

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.usage.seconds[name] += time.perf_counter() - began


@dataclass(frozen=True)
class _Draws:
    """How the rows' tokens are drawn, and which truncations any of them asks for; the others are not computed."""

    seed_B: Tensor
    temperature_B1: Tensor
    top_p_B1: Tensor
    min_prior_B1: Tensor
    greedy_B: Tensor
    favourite_B: Tensor
    prior: bool
    top_p: bool
    drawn: bool

    @classmethod
    def of(cls, rows: np.ndarray, device: torch.device) -> _Draws:
        names = ("seed", "temperature", "top_p", "min_prior", "greedy", "favourite")
        seed, temperature, top_p, min_prior, greedy, favourite = (
            torch.from_numpy(rows[name].copy()).to(device) for name in names
        )
        return cls(
            seed,
            temperature[:, None],
            top_p[:, None],
            min_prior[:, None],
            greedy,
            favourite,
            prior=bool((rows["min_prior"] > 0).any()),
            top_p=bool((rows["top_p"] < 1).any()),
            drawn=not rows["greedy"].all(),
        )


def _choose(logp_BV: Tensor, boundary_B: Tensor, draws: _Draws, step_B: Tensor) -> tuple[Tensor, Tensor]:
    """Next tokens [B], and their log-probs under the distribution they come from."""
    kept_BV = _truncate(logp_BV, boundary_B, draws)
    token_B = kept_BV.argmax(1)
    if draws.drawn:
        decided_B = draws.greedy_B | (boundary_B & draws.favourite_B)
        token_B = torch.where(decided_B, token_B, _draw(kept_BV, uniform(draws.seed_B, step_B)))
    return token_B, kept_BV.gather(1, token_B[:, None])[:, 0]


def _truncate(logp_BV: Tensor, boundary_B: Tensor, draws: _Draws) -> Tensor:
    """The distribution that is really sampled from: improbable functional tokens pruned, contents cut to the top-p nucleus."""
    kept_BV = logp_BV
    if draws.prior:
        best = logp_BV.max(1, keepdim=True).values
        rare = (logp_BV < draws.min_prior_B1.log()) & (logp_BV < best) & boundary_B[:, None]
        kept_BV = kept_BV.masked_fill(rare, -torch.inf)
    if draws.top_p:
        ordered, index = kept_BV.sort(1, descending=True)
        mass = ordered.exp()
        outside = (mass.cumsum(1) - mass >= draws.top_p_B1) & ~boundary_B[:, None]
        kept_BV = kept_BV.masked_fill(torch.zeros_like(outside).scatter(1, index, outside), -torch.inf)
    return kept_BV if kept_BV is logp_BV else kept_BV.log_softmax(1)


def _draw(logp_BV: Tensor, uniform_B: Tensor) -> Tensor:
    """Tokens by inverse CDF, from one uniform number a row."""
    mass_BV = logp_BV.exp().double().cumsum(1)
    drawn_B = torch.searchsorted(mass_BV, (uniform_B * mass_BV[:, -1])[:, None], right=True)[:, 0]
    return drawn_B.clamp(max=logp_BV.shape[1] - 1)


def uniform(seed_B: Tensor, step_B: Tensor) -> Tensor:
    """Uniform numbers in [0, 1), float64, by SplitMix64 (Steele et al. 2014) of (seed, step) in wrapping int64 arithmetic: a row's
    draws do not depend on the batch around it."""
    z = seed_B + _wrap(0x9E3779B97F4A7C15) * (step_B + 1)
    z = (z ^ _shift(z, 30)) * _wrap(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _wrap(0x94D049BB133111EB)
    return _shift(z ^ _shift(z, 31), 11).double() * 2.0**-53


def _wrap(number: int) -> int:
    number &= (1 << 64) - 1
    return number - (1 << 64) if number >> 63 else number


def _shift(z: Tensor, by: int) -> Tensor:
    """Logical right shift of int64."""
    return (z >> by) & ((1 << (64 - by)) - 1)
