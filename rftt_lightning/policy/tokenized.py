"""What all backends have in common that hold a tokenizer: chat template, grammar over ids, text of ids."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rftt_lightning.core.contracts import (
    QUESTION,
    Backend,
    Completion,
    Finish,
    Message,
    Provenance,
    Request,
    Segment,
    UserError,
)
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.vocab import NOTHING, Vocabulary, find, text_tags


def read_table(tokens: str | None, mask: Sequence[str]) -> TokenTable:
    """The functional-token table of a YAML file (None is the paper's) without the tokens of ``mask``. Raises
    :class:`UserError` if one of these is not in it, or could not be kept from being written."""
    table = TokenTable.from_yaml(resolve(tokens) if tokens else None)
    if mask and table.as_text:
        raise UserError(
            f"backend.mask names {', '.join(mask)}, but tags of {tokens} are text, which nothing masks; leave it empty"
        )
    for name in mask:
        if name not in table.names:
            raise UserError(f"backend.mask names {name!r}, which is not among the tokens {', '.join(table.names)}")
    return table.without(*mask)


class TokenizedBackend(Backend):
    """A backend that speaks token ids. ``width`` is that of the logits, ``ends`` are the ids that end the assistant's turn,
    ``limit`` the positions that the model has."""

    def _bind(
        self,
        tokenizer: PreTrainedTokenizerBase,
        table: TokenTable,
        width: int,
        ends: Sequence[int],
        limit: int,
        batch_size: int,
    ) -> None:
        if batch_size < 1:
            raise UserError(f"backend.batch_size is {batch_size}; it must be at least 1")
        known = tokenizer.get_vocab()
        taught = table.as_text or any(tag in known for tag in table.tags)  # a base model writes free text only
        self.tokenizer, self.tokens, self.ends, self.limit, self.batch_size = tokenizer, table, ends, limit, batch_size
        self.vocabulary = Vocabulary(tokenizer, table if taught else NOTHING, width, ends)
        self._tags = text_tags(tokenizer, table) if table.as_text else {}
        self._chat = lru_cache(maxsize=1 << 10)(self._template)
        self._text = lru_cache(maxsize=1 << 12)(self._detokenize)  # short contents recur

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

    def check(self, request: Request) -> None:
        """Raise :class:`UserError` if the model cannot answer it."""
        if not request.prompt or request.max_tokens < 1:
            raise UserError("a request needs a prompt and max_tokens >= 1")
        if request.after is None:
            return
        if self.tokens.as_text:
            if request.after != QUESTION or request.force:
                raise UserError(
                    "tags that are text cannot be searched over, whole rollouts can be sampled: set expander.mode to sample"
                )
            return
        if not self.vocabulary.names:
            raise UserError(
                f"the model's tokenizer has no functional token {self.tokens.tags[0]}, so it cannot choose any; "
                "use an SFT model, or add them with `rftt tokens --model … --save …`"
            )
        closed = dict(zip(self.vocabulary.closes, self.vocabulary.names, strict=True)).get(request.prompt[-1], QUESTION)
        if closed != request.after:
            raise UserError(
                f"a request says that {request.after!r} came last, but its prompt ends after {closed!r}; mend it"
            )
        legal = self.tokens.legal(request.after)
        if not legal or (request.force and request.force not in legal):
            raise UserError(
                f"the grammar lets {', '.join(legal) or 'nothing'} follow {request.after!r}, not {request.force!r}; give the "
                "backend the table (and mask) that the requests were made with"
            )

    def unwritten(self, request: Request) -> Completion:
        """The answer where the context leaves no room: a segment that is cut before its first token."""
        if request.after is not None and request.force is None:
            raise UserError(
                f"a question of {len(request.prompt)} tokens does not fit the model's {self.limit} positions; leave it out"
            )
        warnings.warn(
            f"a context of {len(request.prompt)} tokens fills the model's {self.limit} positions", stacklevel=2
        )
        segment = Segment(request.force or "", (), (), (), "", False, {}, self.version)
        return Completion((segment,), finish=Finish.CONTEXT)

    def freed(self, request: Request) -> Request:
        """What is really asked where tags are text: a rollout is free text of no tag, whose budget is that of the path."""
        if request.after is None or not self.tokens.as_text:
            return request
        whole = replace(request.sampling, max_segment_tokens=request.max_tokens)
        return replace(request, sampling=whole, after=None, force=None)

    def free(
        self, request: Request, tokens: Sequence[int], logprobs: Sequence[float], ended: bool
    ) -> tuple[tuple[Segment, ...], dict[str, float]]:
        """Segments of free text, and the priors before them: one, or as many as are found where tags are text.

        There, what stands in place of a tag, that of a token that the grammar does not let follow included, is a segment
        without tag that is not closed, to the end; after the segments that are asked for nothing is read. Of the priors only that
        of the token which was written is known."""
        if not self._tags or request.force is not None:
            chosen = (int(Provenance.SAMPLED),) * len(tokens)
            text = self.text(tokens)
            segment = Segment(
                request.force or "", tuple(tokens), tuple(logprobs), chosen, text, ended, {}, self.version
            )
            return (segment,), {}
        tokens, after, at = tuple(tokens), QUESTION, 0
        found: list[Segment] = []
        likely: list[dict[str, float]] = []
        while (at < len(tokens) and len(found) != request.segments) or not found:
            followers = [(name, *self._tags[name]) for name in self.tokens.legal(after)]
            written = (follower for follower in followers if tokens[at : at + len(follower[1])] == follower[1])
            tag, opening, closing = next(written, ("", (), ()))
            begin = at + len(opening)
            stop = find(tokens, closing, begin) if tag else None
            end = len(tokens) if stop is None else stop + len(closing)
            text = self.text(tokens[begin : end if stop is None else stop])
            part, chosen = tuple(logprobs[at:end]), (int(Provenance.SAMPLED),) * (end - at)
            found.append(Segment(tag, tokens[at:end], part, chosen, text, stop is not None, {}, self.version))
            likely.append({tag: math.exp(sum(part[: len(opening)]))})
            after, at = tag, end
        segments = (replace(segment, priors=priors) for segment, priors in zip(found, [*likely[1:], {}], strict=True))
        return tuple(segments), likely[0]

    def text(self, tokens: Sequence[int]) -> str:
        return self._text(tuple(tokens))

    def _detokenize(self, tokens: tuple[int, ...]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
