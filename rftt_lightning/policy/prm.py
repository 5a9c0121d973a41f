"""Process reward models that score steps: Hugging Face models in process, in two styles, or served over HTTP.

A PRM reads a question and steps, with a separator after each, and says at each separator how likely the steps so far are
right. Shape suffixes: B rows, T tokens, N separators.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import warnings
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModel, AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from rftt_lightning.core.contracts import ProblemSource, Step, Usage, UserError
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.hf import fingerprint
from rftt_lightning.policy.logprobs import check_parts, parts
from rftt_lightning.policy.remote import Failure, Server, in_threads
from rftt_lightning.policy.rewards import StepPath, StepScorer
from rftt_lightning.policy.tokenized import DATE
from rftt_lightning.policy.vocab import load

Scores = tuple[float | None, ...]


@dataclass(frozen=True)
class Written:
    """A path as a PRM reads it: ``Written((5, 9, 130, 7, 146), ends=(1, 4))``. ``ends[0]`` is the place of the question's last
    token, ``ends[i]`` that of the separator after step i."""

    tokens: tuple[int, ...]
    ends: tuple[int, ...]


class Writer:
    """Writes question and steps for a PRM.

    ``prompt`` makes text of a question, ``step`` is the format of a step (``{number}`` from 1, ``{tag}``, ``{text}``),
    ``separators`` are the tokens at which scores are read, each one id. What a text spells of separators and special
    tokens is blanked, so that no path can write marks of its own.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: Callable[[str], str],
        step: str,
        separators: Sequence[str],
        special: bool = False,
    ) -> None:
        known = tokenizer.get_vocab()
        if missing := [mark for mark in separators if mark not in known]:
            raise UserError(
                f"the PRM's tokenizer has no token {missing[0]!r}; give the separator that it was trained with"
            )
        if not tokenizer.is_fast:
            raise UserError(
                "the PRM's tokenizer is none of the fast ones, which say where each token stands; convert it"
            )
        self.tokenizer, self.prompt, self.step, self.special = tokenizer, prompt, step, special
        self.ids = frozenset(known[mark] for mark in separators)
        spelled = {
            mark.strip("▁ \n") for mark in (*separators, *tokenizer.all_special_tokens, *tokenizer.get_added_vocab())
        }
        self._marks = re.compile("|".join(re.escape(mark) for mark in sorted(spelled - {""}, key=len, reverse=True)))

    def __call__(self, question: str, steps: Sequence[Step]) -> Written | None:
        """None if the separators cannot be told from the rest."""
        prompt = self.prompt(self._clean(question))
        formatted = (self.step.format(number=i, tag=s.tag, text=self._clean(s.text)) for i, s in enumerate(steps, 1))
        text, last = prompt + "".join(formatted), len(prompt.rstrip())
        encoded = self.tokenizer(text, add_special_tokens=self.special, return_offsets_mapping=True)
        tokens, places = encoded["input_ids"], encoded["offset_mapping"]
        # Not the token of the last character: one that a normaliser has composed with another has none.
        start = max((i for i, (begin, end) in enumerate(places) if begin < min(end, last)), default=-1)
        ends = [i for i, token in enumerate(tokens) if i > start and token in self.ids]
        return Written(tuple(tokens), (max(start, 0), *ends)) if len(ends) == len(steps) else None

    def _clean(self, text: str) -> str:
        return self._marks.sub(" ", _encodable(text))


def functional_writer(tokenizer: PreTrainedTokenizerBase, table: TokenTable) -> Writer:
    """Steps as the policy writes them, ``<tag>…</tag>`` after the chat-templated question; scores are read at closing tokens."""
    return Writer(tokenizer, chat(tokenizer, None), "<{tag}>{text}</{tag}>", [token.close for token in table.tokens])


def chat(tokenizer: PreTrainedTokenizerBase, system: str | None) -> Callable[[str], str]:
    """The prompt of a chat model: the question as the user's turn, then the beginning of the assistant's."""
    first = [{"role": "system", "content": system}] if system else []

    def prompt(question: str) -> str:
        turns = [*first, {"role": "user", "content": question}]
        return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, date_string=DATE)

    return prompt


class LocalPRM(StepScorer):
    """A causal PRM in process. Paths are sorted by length and read in batches of at most ``batch_tokens`` positions, padding
    included (a longer path alone). Steps that end beyond the model's context have no score, and are counted in ``unscored``.
    ``name`` holds the weights' fingerprint, so that a run refuses to go on with another PRM."""

    name: str

    def _bind(
        self,
        path: str,
        model: PreTrainedModel,
        writer: Writer,
        batch_tokens: int,
        max_length: int | None,
        relative: bool,
    ) -> None:
        if batch_tokens < 1 or (max_length is not None and max_length < 1):
            raise UserError(
                f"scorer.batch_tokens is {batch_tokens}, scorer.max_length {max_length}; both must be at least 1"
            )
        self._model, self._writer = model.eval(), writer
        self.name, self.relative = f"{path} {fingerprint(model)}", relative
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30
        self.limit = min(limit, max_length or limit)
        self._batch_tokens, self._unscored = batch_tokens, 0

    @property
    def unscored(self) -> int:
        """Steps so far that have no score."""
        return self._unscored

    @torch.no_grad()
    def score(self, source: ProblemSource | None, paths: Sequence[StepPath]) -> list[Scores]:
        """Raises nothing on what is in the texts."""
        written = {i: w for i, (problem, steps) in enumerate(paths) if (w := self._writer(problem.question, steps))}
        found: list[Scores] = [(None,) * len(steps) for _, steps in paths]
        for rows in self._batches({i: min(len(w.tokens), self.limit) for i, w in written.items()}):
            for i, values in zip(rows, self._read([written[i] for i in rows]), strict=True):
                scores = relative(values) if self.relative else values[1:]
                found[i] = (*scores, *found[i][len(scores) :])
        unscored = sum(s is None for scores in found for s in scores)
        if unscored:
            self._unscored += unscored
            steps = sum(map(len, found))
            warnings.warn(
                f"{unscored} of {steps} steps have no score: they end beyond the PRM's {self.limit} tokens, or hide "
                "their separators",
                stacklevel=2,
            )
        return found

    def _batches(self, lengths: Mapping[int, int]) -> Iterator[list[int]]:
        rows: list[int] = []
        for i in sorted(lengths, key=lambda i: lengths[i]):
            if rows and lengths[i] * (len(rows) + 1) > self._batch_tokens:
                yield rows
                rows = []
            rows.append(i)
        if rows:
            yield rows

    def _read(self, written: Sequence[Written]) -> list[list[float]]:
        """Values at the ends of each path, those within the context."""
        device = self._model.device
        rows = [w.tokens[: self.limit] for w in written]
        tokens_BT = torch.zeros(len(rows), max(map(len, rows)), dtype=torch.long)
        mask_BT = torch.zeros_like(tokens_BT)
        for b, row in enumerate(rows):
            tokens_BT[b, : len(row)], mask_BT[b, : len(row)] = torch.tensor(row), 1
        ends = [[end for end in w.ends if end < len(row)] for row, w in zip(rows, written, strict=True)]
        places = [(b, end) for b, some in enumerate(ends) for end in some]
        places_N2 = torch.tensor(places, dtype=torch.long, device=device).view(-1, 2)
        values_N = self._values(tokens_BT.to(device), mask_BT.to(device), *places_N2.unbind(1)).float().cpu()
        return [part.tolist() for part in values_N.split([len(some) for some in ends])]

    @abstractmethod
    def _values(self, tokens_BT: Tensor, mask_BT: Tensor, rows_N: Tensor, ends_N: Tensor) -> Tensor:
        """[N] probabilities at these places."""


def relative(values: Sequence[float]) -> list[float]:
    """What each step keeps of the value before it, at most 1: ``min(1, V_i / V_{i-1})``, V_0 that of the question (progress as
    in arXiv 2410.08146, as a ratio). A step after a mistake is then judged by itself.

    >>> relative([0.8, 0.4, 0.4, 0.6])
    [0.5, 1.0, 1.0]
    """
    return [min(1.0, now / max(before, 1e-6)) for before, now in pairwise(values)]


class StepTagPRM(LocalPRM):
    """Math-Shepherd's style (arXiv 2312.08935): a causal LM reads a tag after each step; the score is the softmax over two
    tokens, ``good`` and ``bad``, of what it would write next.

    Args:
        model: Hugging Face folder, ``pkg:`` path or hub name (``peiyi9979/math-shepherd-mistral-7b-prm``).
        tag: the separator; good, bad: the two tokens. Each is a token of the vocabulary or text whose last token counts.
        step: format of a step; ``{tag}`` is its functional token's name, ``{number}`` counts from 1, the tag follows it.
        batch_tokens: positions read at a time; max_length: tokens of a path that are read, null: as many as the model has.
        dtype, device, attention: as in HFBackend.
    """

    def __init__(
        self,
        model: str,
        tag: str = "ки",
        good: str = "+",
        bad: str = "-",
        step: str = "Step {number}: {text} ",
        batch_tokens: int = 16384,
        max_length: int | None = None,
        dtype: str = "auto",
        device: str = "auto",
        attention: str = "sdpa",
    ) -> None:
        network, tokenizer = load(model, *_where(dtype, device, attention))
        check_parts(network)
        self.tag, self.good, self.bad, self.step = tag, good, bad, _checked(step)
        separator, *pair = (_token(tokenizer, text) for text in (tag, good, bad))
        writer = Writer(
            tokenizer, lambda question: f"{question} ", f"{step}{_escape(tag)}\n", [separator], special=True
        )
        self._pair: list[int] = tokenizer.convert_tokens_to_ids(pair)
        self._bind(model, network, writer, batch_tokens, max_length, relative=False)

    def _values(self, tokens_BT: Tensor, mask_BT: Tensor, rows_N: Tensor, ends_N: Tensor) -> Tensor:
        backbone, head = parts(self._model)
        hidden_NH = backbone(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False).last_hidden_state[
            rows_N, ends_N
        ]
        return head(hidden_NH)[:, self._pair].float().softmax(-1)[:, 0]


class StepClassifierPRM(LocalPRM):
    """Qwen2.5-Math-PRM's style (arXiv 2501.07301): a token classifier with two labels reads a separator after each step; the
    score is its probability of label 1 there. What ``rftt prm fit`` writes is read so with the defaults.

    Args:
        model: Hugging Face folder, ``pkg:`` path or hub name.
        separator: token after each step (Qwen2.5-Math-PRM: ``<extra_0>``); null: steps are written with their functional tokens,
            as the policy does, and closing tokens are the separators.
        step: format of a step before its separator; unused where the separator is null.
        system: the chat's system message, null for none (Qwen2.5-Math-PRM: "Please reason step by step, and put your final
            answer within \\boxed{}.").
        relative: score a step by what it keeps of the value before it (:func:`relative`); off: by the value itself, the
            probability that the path ends right.
        remote_code: run the model code that comes with the folder (Qwen2.5-Math-PRM needs it); only for folders you trust.
        tokens: functional-token table (YAML); None is the paper's.
        batch_tokens: positions read at a time; max_length: tokens of a path that are read, null: as many as the model has.
        dtype, device, attention: as in HFBackend.
    """

    def __init__(
        self,
        model: str,
        separator: str | None = None,
        step: str = "{text}",
        system: str | None = None,
        relative: bool = False,
        remote_code: bool = False,
        tokens: str | None = None,
        batch_tokens: int = 16384,
        max_length: int | None = None,
        dtype: str = "auto",
        device: str = "auto",
        attention: str = "sdpa",
    ) -> None:
        auto = AutoModel if remote_code else AutoModelForTokenClassification
        options: dict[str, Any] = {"trust_remote_code": True} if remote_code else {}
        where = _where(dtype, device, attention)
        network, tokenizer = load(model, *where, auto=auto, whole=True, **options)
        if network.config.num_labels != 2:
            raise UserError(f"{model} has {network.config.num_labels} labels; a step classifier has 2, wrong and right")
        self.separator, self.step, self.system = separator, _checked(step), system
        if separator is None:
            writer = functional_writer(tokenizer, TokenTable.from_yaml(resolve(tokens) if tokens else None))
        else:
            writer = Writer(tokenizer, chat(tokenizer, system), f"{step}{_escape(separator)}", [separator])
        self._bind(model, network, writer, batch_tokens, max_length, relative)

    def _values(self, tokens_BT: Tensor, mask_BT: Tensor, rows_N: Tensor, ends_N: Tensor) -> Tensor:
        logits_BT2 = self._model(input_ids=tokens_BT, attention_mask=mask_BT, use_cache=False)[0]
        return logits_BT2[rows_N, ends_N].float().softmax(-1)[:, 1]


def _where(dtype: str, device: str, attention: str) -> tuple[str, str, str]:
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    return "float32" if dtype == "auto" and device == "cpu" else dtype, attention, device


def _checked(step: str) -> str:
    try:
        step.format(number=1, tag="next_step", text="")
    except (KeyError, IndexError, ValueError) as error:
        raise UserError(f"scorer.step is {step!r}; it may name {{number}}, {{tag}} and {{text}} ({error})") from error
    if "{text}" not in step:
        raise UserError(f"scorer.step is {step!r}; it must name {{text}}")
    return step


def _escape(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")


def _encodable(text: str) -> str:
    """Lone surrogates, which no UTF-8 has, become question marks."""
    return text.encode("utf-8", "replace").decode()


def _token(tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """The token that a text is, or ends with where tokenizers put a space before it."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids or ids[-1] == tokenizer.unk_token_id:
        raise UserError(f"the PRM's tokenizer does not know {text!r}; give the tokens that it was trained with")
    return tokenizer.convert_ids_to_tokens(ids[-1])


# -- served ----------------------------------------------------------------------------------------------------------------


class RemotePRM(StepScorer):
    """A PRM that ``rftt prm serve`` serves. A server that is away is asked again for ``patience`` seconds, so it may be restarted;
    then :class:`Unavailable` ends the run, which goes on when the server is back.

    Args:
        url: the server's address.
        model: what the server must say that it serves (its /health does: name and fingerprint of the weights); null: anything.
        concurrency: requests in flight.
        batch: paths in a request; no more than the server takes.
        timeout: seconds that one request may take.
        patience: seconds of failures that a request outlives.
        cache: paths whose scores are remembered; the longest unused is forgotten first.
        api_key_env: name of the environment variable that holds an API key, if something in front of the server wants one.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        concurrency: int = 8,
        batch: int = 32,
        timeout: float = 120.0,
        patience: float = 300.0,
        cache: int = 100_000,
        api_key_env: str = "RFTT_API_KEY",
    ) -> None:
        for name, value in (("concurrency", concurrency), ("batch", batch)):
            if value < 1:
                raise UserError(f"scorer.{name} is {value}; it must be at least 1")
        if cache < 0:
            raise UserError(f"scorer.cache is {cache}; it must be at least 0")
        self.model, self._usage = model, Usage()
        key = os.environ.get(api_key_env, "")
        self._server = Server(url, key, concurrency, timeout, patience, self._usage, option="scorer")
        self._concurrency, self._batch, self._cache_size = concurrency, batch, cache
        self._cache: OrderedDict[bytes, Scores] = OrderedDict()
        self._bytes: int | None = None

    def score(self, source: ProblemSource | None, paths: Sequence[StepPath]) -> list[Scores]:
        keys = [_key(problem.question, steps) for problem, steps in paths]
        known = {key: self._cache[key] for key in keys if key in self._cache}
        asked = {key: path for key, path in zip(keys, paths, strict=True) if key not in known}
        if asked:
            known |= self._ask(asked)
        for key in keys:
            self._cache[key] = known[key]
            self._cache.move_to_end(key)
        while len(self._cache) > self._cache_size:
            self._cache.popitem(last=False)
        return [known[key] for key in keys]

    def _ask(self, asked: Mapping[bytes, StepPath]) -> dict[bytes, Scores]:
        self._meet()
        items = {key: _item(p.question, steps) for key, (p, steps) in asked.items()}
        requests = ({key: items[key] for key in keys} for keys in self._requests(items))
        found: dict[bytes, Scores] = {}
        for ready in in_threads(self._call, lambda room: list(islice(requests, room)), self._concurrency):
            for _, scores in ready:
                found |= scores
        if huge := [key for key in asked if key not in found]:
            warnings.warn(
                f"{len(huge)} paths are too long for a request to the PRM; their steps have no score", stacklevel=3
            )
        return found | {key: (None,) * len(asked[key][1]) for key in huge}

    def _requests(self, items: Mapping[bytes, Any]) -> Iterator[list[bytes]]:
        """Keys of the paths of each request; those that alone are too long for one are left out."""
        keys: list[bytes] = []
        size = 0
        for key, item in items.items():
            more = len(json.dumps(item)) + 100  # no less than in UTF-8
            if more > (self._bytes or more):
                continue
            if keys and (len(keys) == self._batch or size + more > (self._bytes or 0)):
                yield keys
                keys, size = [], 0
            keys.append(key)
            size += more
        if keys:
            yield keys

    def _call(self, items: Mapping[bytes, Any], halt: threading.Event) -> dict[bytes, Scores]:
        counts = [len(item["steps"]) for item in items.values()]
        scores = self._server.call("/score", {"paths": list(items.values())}, lambda data: _scores(data, counts), halt)
        return dict(zip(items, scores, strict=True))

    def _meet(self) -> None:
        """Ask the server what it serves, and how much it takes at a time."""
        health = self._server.call("/health", None, _health, threading.Event())
        if self.model is not None and health["model"] != self.model:
            raise UserError(
                f"{self._server.url} serves {health['model']!r}, scorer.model is {self.model!r}; start the right PRM"
            )
        if self._bytes is None:
            self._batch = min(self._batch, health["max_paths"])
        self._bytes = health["max_bytes"]


def _item(question: str, steps: Sequence[Step]) -> dict[str, Any]:
    return {"question": _encodable(question), "steps": [[step.tag, _encodable(step.text)] for step in steps]}


def _key(question: str, steps: Sequence[Step]) -> bytes:
    content = repr((question, [tuple(step) for step in steps])).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(content, digest_size=16).digest()


def _health(data: Any) -> dict[str, Any]:
    kinds = {"model": str, "max_paths": int, "max_bytes": int}
    if not isinstance(data, Mapping) or not all(isinstance(data.get(name), kind) for name, kind in kinds.items()):
        raise Failure("malformed", f"/health is not that of a PRM server: {str(data)[:100]}")
    return dict(data)


def _scores(data: Any, counts: Sequence[int]) -> list[Scores]:
    rows = data.get("scores") if isinstance(data, Mapping) else None
    shaped = isinstance(rows, list) and all(isinstance(row, list) for row in rows)
    if not shaped or [len(row) for row in rows] != list(counts):  # type: ignore[union-attr]
        raise Failure("malformed", f"/score gives no score per step: {str(data)[:100]}")
    for score in (score for row in rows for score in row):  # type: ignore[union-attr]
        if score is not None and not (isinstance(score, int | float) and 0 <= score <= 1):
            raise Failure("malformed", f"/score gives {str(score)[:100]}, which is no number in 0..1")
    return [tuple(row) for row in rows]  # type: ignore[union-attr]
