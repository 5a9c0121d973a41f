"""The same policy asked in other ways: segment by segment, with the library's own ``generate``, nothing kept between calls."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase

from rftt_lightning.core.contracts import Completion, Finish, Provenance, Request, Segment, collect
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.tokenized import TokenizedBackend
from rftt_lightning.policy.vocab import end_ids, masked_log_softmax


@dataclass
class _Path:
    """A request under way: tokens so far, ``priors`` of the tag to come, and which tag it is."""

    number: int
    request: Request
    tag: str | None
    tokens: list[int]
    written: int = 0
    segments: list[Segment] = field(default_factory=list)
    priors: dict[str, float] = field(default_factory=dict)
    first_priors: dict[str, float] = field(default_factory=dict)
    computed: int = 0

    @property
    def room(self) -> int:
        """Tokens that the segment to be written may have."""
        return min(self.request.sampling.max_segment_tokens, self.request.max_tokens - self.written)


class _Mask(LogitsProcessor):
    """The grammar inside a segment: ordinary tokens and its own closing tag."""

    def __init__(self, allowed_BV: Tensor) -> None:
        self.forbidden_BV = ~allowed_BV

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.masked_fill(self.forbidden_BV, -torch.inf)


class SegmentBackend(TokenizedBackend):
    """Two calls a segment for all requests under way, each over their whole contexts, padded on the left: one of ``generate``
    for the content up to the closing tag, and one forward pass for the probabilities of the functional tokens that may follow.

    With ``batch_size`` 1 that is the pattern of the code that was released with the paper. Greedy only; log-probabilities,
    which the trees of this experiment do not need, are left out (all 0), which saves this engine some work.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, table: TokenTable, batch_size: int
    ) -> None:
        width = model.get_output_embeddings().weight.shape[0]
        limit = model.config.max_position_embeddings
        self._bind(tokenizer, table, width, end_ids(tokenizer, None), limit, batch_size)
        self.model = model.eval()
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self.began = time.perf_counter()

    def _end(self, *_: object) -> None:
        self.usage.seconds["model"] += time.perf_counter() - self.began
        self.usage.calls += 1

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return collect(self, requests)

    @torch.no_grad()
    def stream(self, more: Callable[[int], Sequence[Request]]) -> Iterator[list[tuple[int, Completion]]]:
        numbers, live = itertools.count(), []
        while True:
            joining = [_Path(next(numbers), r, r.force, list(r.prompt)) for r in more(self.batch_size - len(live))]
            live += joining
            if not live:
                return
            unforced = [path for path in joining if path.tag is None]
            self._rank(unforced, [path.request.after for path in unforced])
            for path in unforced:
                path.first_priors = path.priors
            self._write(live)
            onward = [path for path in live if path.segments[-1].closed and not self._terminal(path)]
            self._rank(onward, [path.segments[-1].tag for path in onward])
            for path in onward:
                self._keep_priors(path)
            ready = [path for path in live if self._over(path)]
            live = [path for path in live if not self._over(path)]
            if ready:
                yield [(path.number, self._completion(path)) for path in ready]

    # -- the two calls ---------------------------------------------------------------------------------------------------

    def _padded(self, paths: Sequence[_Path]) -> tuple[Tensor, Tensor]:
        longest = max(len(path.tokens) for path in paths)
        gaps = [longest - len(path.tokens) for path in paths]
        ids = [[self.tokenizer.pad_token_id] * gap + path.tokens for gap, path in zip(gaps, paths, strict=True)]
        mask = [[0] * gap + [1] * (longest - gap) for gap in gaps]
        return torch.tensor(ids), torch.tensor(mask)

    def _rank(self, paths: Sequence[_Path], after: Sequence[str]) -> None:
        """Which functional token comes next, and how probable each is."""
        if not paths:
            return
        ids_BT, mask_BT = self._padded(paths)
        positions_BT = (mask_BT.cumsum(1) - 1).clamp(min=0)
        output = self.model(
            input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT, use_cache=False, logits_to_keep=1
        )
        state_B = torch.tensor([self.vocabulary.boundary(tag) for tag in after])
        logp_BV = masked_log_softmax(output.logits[:, -1], state_B, self.vocabulary.allowed_SV)
        for path, row in zip(paths, logp_BV[:, self.vocabulary.opens].exp().tolist(), strict=True):
            path.priors = {tag: p for tag, p in zip(self.tokens.names, row, strict=True) if p > 0.0}
            path.tag = max(path.priors, key=path.priors.__getitem__)
            path.computed += ids_BT.shape[1]

    def _write(self, paths: Sequence[_Path]) -> None:
        """One segment each: the opening tag, the content, and the closing tag."""
        for path in paths:
            path.tokens.append(self.vocabulary.opens[self.vocabulary.names.index(path.tag)])
        writing = [path for path in paths if path.room > 1]
        found = dict(zip(map(id, writing), self._contents(writing), strict=True)) if writing else {}
        for path in paths:
            content = found.get(id(path), [])[: path.room - 1]
            opening, closed = path.tokens[-1], bool(content) and content[-1] in self.vocabulary.closes
            path.tokens += content
            path.written += 1 + len(content)
            first = path.request.forced_as if not path.segments and path.request.force else Provenance.ARGMAX
            path.segments.append(
                Segment(
                    path.tag,
                    (opening, *content),
                    (0.0,) * (1 + len(content)),
                    (int(first), *[int(Provenance.SAMPLED)] * len(content)),
                    self.text(content[:-1] if closed else content),
                    closed,
                )
            )

    def _contents(self, paths: Sequence[_Path]) -> list[list[int]]:
        ids_BT, mask_BT = self._padded(paths)
        inside_B = [1 + self.vocabulary.names.index(path.tag) for path in paths]
        began, before = time.perf_counter(), self.usage.seconds["model"]
        ids = self.model.generate(
            input_ids=ids_BT,
            attention_mask=mask_BT,
            logits_processor=LogitsProcessorList([_Mask(self.vocabulary.allowed_SV[inside_B])]),
            max_new_tokens=max(path.room for path in paths) - 1,
            eos_token_id=self.vocabulary.closes,
            pad_token_id=self.tokenizer.pad_token_id,
            do_sample=False,
        )[:, ids_BT.shape[1] :].tolist()
        self.usage.seconds["generate"] += time.perf_counter() - began - (self.usage.seconds["model"] - before)
        pad = self.tokenizer.pad_token_id  # never chosen: the grammar forbids it
        contents = [[token for token in row if token != pad] for row in ids]
        self.usage.steps += len(ids[0])
        self.usage.rows += sum(map(len, contents))
        for path in paths:
            path.computed += ids_BT.shape[1] + len(ids[0]) - 1  # the last token of all is not read
        return contents

    # -- a path's end ----------------------------------------------------------------------------------------------------

    def _terminal(self, path: _Path) -> bool:
        return self.tokens.terminal(path.segments[-1].tag)

    def _keep_priors(self, path: _Path) -> None:
        last = path.segments[-1]
        path.segments[-1] = Segment(
            last.tag, last.tokens, last.logprobs, last.provenance, last.text, last.closed, path.priors
        )

    def _over(self, path: _Path) -> bool:
        spent = len(path.segments) == path.request.segments or path.written >= path.request.max_tokens
        return spent or not path.segments[-1].closed or self._terminal(path)

    def _completion(self, path: _Path) -> Completion:
        last = path.segments[-1]
        cut = Finish.LENGTH if path.written >= path.request.max_tokens else Finish.SEGMENT
        finish = Finish.STOP if last.closed and path.written < path.request.max_tokens else cut
        return Completion(tuple(path.segments), path.first_priors, path.computed, finish)
