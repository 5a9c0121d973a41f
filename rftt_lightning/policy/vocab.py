"""Functional tokens as rows of a vocabulary, and the grammar as a mask over it.

Shape suffixes: B rows, T tokens, V vocabulary (width of the logits), S grammar states.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import (
    AddedToken,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rftt_lightning.core.contracts import QUESTION, UserError
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable

INITS = ("description", "random", "mean")
DTYPES = ("auto", "bfloat16", "float16", "float32", "float64")

RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>|<unused_?\d+>|<\|dummy_\d+\|>")
"""Names under which tokenizers keep rows for their users (Llama 3, Gemma, Phi)."""


def load(
    path: str,
    dtype: str = "auto",
    attention: str = "sdpa",
    device: str | torch.device = "cpu",
    auto: Any = AutoModelForCausalLM,
    whole: bool = False,
    **options: Any,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer from a folder, a ``pkg:`` path or the hub; ``dtype`` is one of :data:`DTYPES`. ``auto`` is the class of
    Transformers that makes the model, ``options`` go to it. Raises :class:`UserError` if either cannot be read, if the
    tokenizer has ids that the model has no rows for, if this machine lacks the device, or, where ``whole``, if the folder lacks
    weights of the model, which would begin random."""
    if dtype not in DTYPES:
        raise UserError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, ImportError) as error:  # whatever the device's part of torch raises
        reason = str(error).splitlines()[0][:100]
        raise UserError(f"device is {str(device)!r}: {reason}; use auto, or a device of this machine") from error
    where = resolve(path)
    local = path.startswith(("pkg:", ".", "/")) or path.count("/") > 1
    if local and not (Path(where) / "config.json").is_file():
        raise UserError(f"no model at {where}: it has no config.json; give a Hugging Face folder or a hub name")
    try:
        tokenizer = AutoTokenizer.from_pretrained(where)
        model, found = auto.from_pretrained(
            where, dtype=dtype, attn_implementation=attention, output_loading_info=True, **options
        )
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot load a model from {path!r}: {reason}") from error
    if whole and found["missing_keys"]:
        raise UserError(
            f"{path} has no weights {min(found['missing_keys'])}, so it is no trained {type(model).__name__}"
        )
    rows = model.get_input_embeddings().weight.shape[0]
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise UserError(
            f"{path}: the tokenizer has ids up to {highest}, the model only {rows} rows: they are not of one vocabulary; "
            "give a folder in which both were saved together"
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device), tokenizer


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    weights: dict[str, Tensor] | None = None,
    dtype: str | None = None,
) -> None:
    """Write a Hugging Face folder that :func:`load` reads. One that is there gets whole files only, loses its old weights, and
    keeps what else is in it. ``weights`` stand in for the model's own; ``dtype`` is what the folder says that they are in."""
    folder = Path(folder).absolute()
    part = folder.with_name(f"{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    model.save_pretrained(part, state_dict=weights)
    if dtype:  # save_pretrained takes it from the live weights
        model.config.dtype = dtype
        model.config.save_pretrained(part)
    tokenizer.save_pretrained(part)
    for old in folder.glob("model*.safetensors*"):  # one file of an earlier export would go before several new ones
        old.unlink()
    shutil.copytree(part, folder, copy_function=os.replace, dirs_exist_ok=True)
    shutil.rmtree(part)


def add_functional_tokens(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    table: TokenTable,
    init: str = "description",
    seed: int = 0,
) -> list[int]:
    """Make every tag, opening and closing, one row of the vocabulary; returns the ids that are new (none if all were there).

    Spare rows of a padded vocabulary are used first, then tokens that the tokenizer reserves for its users (they are renamed);
    only then is the embedding enlarged, and it never shrinks. Input and, if untied, output rows are
    initialised: ``description``: the mean of the rows of the token's description words plus 0.3 standard deviations of noise
    (closing tags: the newline's row, else end of turn, plus 0.5); ``random``: noise of the usual size; ``mean``: the mean of all
    rows. Rows that start nearly equal are ignored by the model (arXiv 2502.13389 leaves the choice open). A table whose tags are
    text needs no rows.
    """
    if init not in INITS:
        raise UserError(f"init is {init!r}; use one of {', '.join(INITS)}")
    if table.as_text:
        return []
    known = tokenizer.get_vocab()
    fresh = [tag for tag in table.tags if tag not in known]
    rows = model.get_input_embeddings().weight.shape[0]
    old = max(known.values()) + 1
    if old + len(fresh) > rows:
        _rename_reserved(tokenizer, fresh)
        old = min([old, *(i for tag, i in tokenizer.get_vocab().items() if tag in fresh)])
    tokenizer.add_tokens([AddedToken(tag, special=False, normalized=False) for tag in fresh])
    needed = max(tokenizer.get_vocab().values()) + 1
    if needed > rows:
        model.resize_token_embeddings(needed, mean_resizing=False)
    generator = torch.Generator().manual_seed(seed)
    for weight in matrices(model):
        _initialise(weight, tokenizer, table, fresh, old, init, generator)
    check_round_trip(tokenizer, table)
    return [tokenizer.get_vocab()[tag] for tag in fresh]


def _rename_reserved(tokenizer: PreTrainedTokenizerBase, tags: Sequence[str]) -> None:
    """Give the names ``tags`` to as many reserved tokens, lowest ids first, as there are (in a fast tokenizer)."""
    if not tokenizer.is_fast or not any(map(RESERVED.fullmatch, tokenizer.get_vocab())):
        return
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    reserved = sorted((t for t in state["added_tokens"] if RESERVED.fullmatch(t["content"])), key=lambda t: t["id"])
    names = {token["content"]: tag for token, tag in zip(reserved, tags, strict=False)}
    for token in reserved[: len(tags)]:
        token.update(content=names[token["content"]], special=False, normalized=False)
    words = state["model"].get("vocab")
    if isinstance(words, dict):  # some models list their added tokens too
        state["model"]["vocab"] = {names.get(word, word): i for word, i in words.items()}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.extra_special_tokens = [t for t in tokenizer.extra_special_tokens if str(t) not in names]


def matrices(model: PreTrainedModel) -> list[Tensor]:
    """Input embedding and, if it is another tensor, output embedding, both [V, hidden]."""
    inputs, head = model.get_input_embeddings().weight, model.get_output_embeddings()
    return [inputs] if head is None or head.weight.data_ptr() == inputs.data_ptr() else [inputs, head.weight]


@torch.no_grad()
def _initialise(
    weight: Tensor,
    tokenizer: PreTrainedTokenizerBase,
    table: TokenTable,
    fresh: Sequence[str],
    old: int,
    init: str,
    generator: torch.Generator,
) -> None:
    used = weight[:old].float()
    mean, spread = used.mean(0), used.std(0)
    ends = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    newline = [i for i in _ids(tokenizer, "\n") if i < old] or ends
    for tag in fresh:
        noise = spread * torch.randn(weight.shape[1], generator=generator).to(weight.device)
        closing = tag.startswith("</")
        like = newline if closing else _words(tokenizer, table[tag.strip("</>")].description, old)
        if init == "mean":
            row = mean
        elif init == "random" or not like:
            row = mean + noise
        else:
            row = used[like].mean(0) + (0.5 if closing else 0.3) * noise
        weight[tokenizer.get_vocab()[tag]] = row.to(weight.dtype)


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    return [i for i in ids if i != tokenizer.unk_token_id]


def text_tags(
    tokenizer: PreTrainedTokenizerBase, table: TokenTable
) -> dict[str, tuple[tuple[int, ...], tuple[int, ...]]]:
    """Ids of the opening and of the closing tag of each token of a table whose tags are text, as SFT writes them: encoded alone. A
    model that merges a tag with its neighbours has not written it. Raises :class:`UserError` where they are not read back, or
    where one opening begins another."""
    found = {}
    for name, texts in table.texts.items():
        pair = [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in texts]
        for text, ids in zip(texts, pair, strict=True):
            said = tokenizer.decode(ids, skip_special_tokens=True)
            if said.split() != text.split() or {*ids} <= {tokenizer.unk_token_id}:
                raise UserError(
                    f"the tokenizer does not read {text!r} of {name} back (got {ids}); write it another way"
                )
        found[name] = pair[0], pair[1]
    opens = sorted((opening, name) for name, (opening, _) in found.items())
    for (short, name), (long, other) in itertools.pairwise(opens):
        if long[: len(short)] == short:
            raise UserError(
                f"the text of {name} begins that of {other}, so they could not be told apart; write one another way"
            )
    return found


def find(tokens: tuple[int, ...], part: tuple[int, ...], begin: int = 0) -> int | None:
    """Where ``part`` first stands in ``tokens``, from ``begin`` on."""
    places = range(begin, len(tokens) - len(part) + 1)
    return next((i for i in places if tokens[i : i + len(part)] == part), None)


def _words(tokenizer: PreTrainedTokenizerBase, description: str, old: int) -> list[int]:
    """Known ids below ``old`` of the description's words, as they stand at a word's beginning and within a text."""
    words = re.findall(r"[a-z]+", description.lower())
    return [i for word in words for text in (word, " " + word) for i in _ids(tokenizer, text) if i < old]


def check_round_trip(tokenizer: PreTrainedTokenizerBase, table: TokenTable) -> None:
    """Every tag encodes to exactly one id, and is read back though special tokens are skipped. Raises :class:`UserError`."""
    known = tokenizer.get_vocab()
    for tag in table.tags:
        if tag not in known:
            raise UserError(
                f"the tokenizer has no functional token {tag}: this model was not given this table; start from an SFT model, "
                "or add them with `rftt tokens --model … --save …`"
            )
        ids = tokenizer(tag, add_special_tokens=False)["input_ids"]
        if ids != [known[tag]] or tokenizer.decode(ids, skip_special_tokens=True).strip() != tag:
            raise UserError(
                f"{tag} does not encode to exactly one id that is read back (got {ids}); use another spelling"
            )


NOTHING = TokenTable((), {QUESTION: ()}, {QUESTION: ()})
"""The table of a model that knows no functional tokens."""


class Vocabulary:
    """Ids of the functional tokens, and which token the grammar allows in which state.

    States: 0 is free text; 1 + i is inside the segment of token i; :meth:`boundary` gives those at which a functional token
    comes next. Inside a segment all ordinary tokens and its own closing tag are allowed, at a boundary the opening tags of
    the legal followers, in free text all but functional tokens. Special tokens (padding, chat roles) are allowed nowhere, and
    ``ends``, which end the turn, in free text alone. ``allowed_SV`` is bool, ``opens`` and ``closes`` are ids in the table's order.

    Of a table whose tags are text it is the vocabulary of :data:`NOTHING`: a rollout is free text, state 0 throughout.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, table: TokenTable, width: int, ends: Sequence[int] = ()
    ) -> None:
        table = NOTHING if table.as_text else table
        check_round_trip(tokenizer, table)
        self.names = table.names
        n, known = len(table.tokens), tokenizer.get_vocab()
        self.opens = [known[token.open] for token in table.tokens]
        self.closes = [known[token.close] for token in table.tokens]
        self.after_V = torch.full((width,), -1)
        self.after_V[self.opens] = torch.arange(1, n + 1)
        self.after_V[self.closes] = torch.arange(n + 2, 2 * n + 2)
        plain_V = plain_tokens(tokenizer, width)
        plain_V[[*self.opens, *self.closes, *ends]] = False
        self.allowed_SV = torch.zeros(2 * n + 2, width, dtype=torch.bool)
        self.allowed_SV[: n + 1] = plain_V
        self.allowed_SV[0, list(ends)] = True
        self.allowed_SV[torch.arange(1, n + 1), self.closes] = True
        for after in (QUESTION, *self.names):
            followers = [self.opens[self.names.index(tag)] for tag in table.legal(after)]
            self.allowed_SV[self.boundary(after), followers] = True
        self.start = self.boundary(QUESTION) if self.names else 0
        ends_path = [table.terminal(name) for name in self.names]
        self.terminal_S = torch.tensor([False] * (n + 2) + ends_path)

    def to(self, device: torch.device | str) -> Vocabulary:
        """Move the tables to a device, in place; returns itself."""
        self.after_V, self.allowed_SV = self.after_V.to(device), self.allowed_SV.to(device)
        self.terminal_S = self.terminal_S.to(device)
        return self

    def boundary(self, after: str) -> int:
        """State in which a functional token comes next, ``after`` this tag (or :data:`QUESTION`)."""
        n = len(self.names)
        return n + 1 if after == QUESTION else n + 2 + self.names.index(after)

    def states(self, tokens_BT: Tensor, first: int | None = None) -> Tensor:
        """Grammar state that governs each response token, [B, T] like the tokens: a function of the ids before it alone.
        ``first`` is the state before the first one (default: the boundary after the question, free text if there are no tags)."""
        start = self.start if first is None else first
        events_BT = self.after_V.to(tokens_BT.device)[tokens_BT]
        where_BT = torch.where(events_BT >= 0, torch.arange(tokens_BT.shape[1], device=tokens_BT.device), -1)
        last_BT = where_BT.cummax(1).values
        after_BT = torch.where(last_BT >= 0, events_BT.gather(1, last_BT.clamp(min=0)), start)
        return torch.cat([torch.full_like(after_BT[:, :1], start), after_BT[:, :-1]], 1)


def plain_tokens(tokenizer: PreTrainedTokenizerBase, width: int) -> Tensor:
    """[V] bool: ids that the tokenizer knows and that are not special; padded rows are not among them."""
    marked = [i for i, token in tokenizer.added_tokens_decoder.items() if token.special]  # Llama 3 lists few of them
    plain = torch.zeros(width, dtype=torch.bool)
    plain[list(tokenizer.get_vocab().values())] = True
    plain[[*tokenizer.all_special_ids, *marked]] = False
    return plain


def end_ids(tokenizer: PreTrainedTokenizerBase, config: Any) -> list[int]:
    """Ids that end the assistant's turn: the tokenizer's, and those that a generation config, if there is one, names."""
    named = getattr(config, "eos_token_id", None)
    ids = [named] if isinstance(named, int) else list(named or [])
    return sorted({i for i in (*ids, tokenizer.eos_token_id) if i is not None})


def masked_log_softmax(logits: Tensor, states: Tensor, allowed_SV: Tensor, temperature: float | Tensor = 1.0) -> Tensor:
    """Log-probabilities [..., V] in nats of the tempered distribution over allowed tokens; -inf elsewhere. Sampler and
    training both come through here, so that they speak of one distribution. ``states`` is [...], ``temperature`` > 0."""
    scores = logits.float() / temperature
    return scores.masked_fill(~allowed_SV[states], -torch.inf).log_softmax(-1)
