"""What all backends have in common that hold a tokenizer: chat template, grammar over ids, text of ids."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from functools import lru_cache, partial

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rftt_lightning.core.contracts import (
    QUESTION,
    Backend,
    Completion,
    Finish,
    Message,
    Request,
    Segment,
    UserError,
)
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.vocab import NOTHING, Vocabulary

DATE = "26 Jul 2024"
"""What chat templates that print a date are given for ``date_string``, so that prompts are the same on every day: what Llama 3.1's
prints if it is given none (those of 3.2 and 3.3 print today's then). Templates that do not ask for it are as they were."""


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
        taught = any(tag in known for tag in table.tags)  # a base model writes free text only
        self.tokenizer, self.tokens, self.ends, self.limit, self.batch_size = tokenizer, table, ends, limit, batch_size
        self.vocabulary = Vocabulary(tokenizer, table if taught else NOTHING, width, ends)
        # Of the tokenizer, not of self: in a cycle a GPU's memory would wait for the garbage collector.
        self._chat = lru_cache(maxsize=1 << 10)(partial(chat_ids, tokenizer))
        self._text = lru_cache(maxsize=1 << 12)(partial(_detokenize, tokenizer))  # short contents recur

    def chat(self, messages: Sequence[Message]) -> tuple[int, ...]:
        return self._chat(tuple(messages))

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

    def text(self, tokens: Sequence[int]) -> str:
        return self._text(tuple(tokens))


def chat_ids(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> tuple[int, ...]:
    """Ids of the chat-templated messages, up to where the assistant begins; the date is :data:`DATE`. Raises :class:`UserError` if
    the template does not take them."""
    turns = [message._asdict() for message in messages]
    try:
        ids = tokenizer.apply_chat_template(turns, add_generation_prompt=True, return_dict=False, date_string=DATE)
    except (ValueError, TemplateError) as error:
        raise UserError(
            f"the tokenizer's chat template does not take these messages ({' '.join(str(error).split())[:200]}); "
            "use an instruct model, or set its chat_template"
        ) from error
    return tuple(ids)


def _detokenize(tokenizer: PreTrainedTokenizerBase, tokens: tuple[int, ...]) -> str:
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
