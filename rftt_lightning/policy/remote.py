"""The served backend: any model behind an OpenAI-compatible ``/v1/completions`` (vLLM, SGLang, llama-cpp-python).

The grammar is kept from here, segment by segment. At a boundary one call of one token, with all but the legal tags biased
away, gives the priors, and the tag is drawn on this side; a second call writes the content and stops at the segment's own
closing tag. Prompts are token ids; a server that takes or gives text only is used as far as that can be proved exact.
"""

from __future__ import annotations

import json
import math
import os
import queue
import random
import threading
import time
import warnings
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import httpx2  # comes with huggingface_hub, so it costs no new package; tenacity is 100 kB without dependencies
from scipy.special import log_softmax, logsumexp
from tenacity import RetryCallState, Retrying, retry_if_exception_type, sleep_using_event, wait_random_exponential
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from rftt_lightning.core.contracts import (
    Completion,
    Finish,
    Provenance,
    Request,
    Sampling,
    Segment,
    Unavailable,
    Usage,
    UserError,
    collect,
)
from rftt_lightning.core.paths import resolve
from rftt_lightning.policy.tokenized import TokenizedBackend, read_table
from rftt_lightning.policy.vocab import end_ids

T = TypeVar("T")
R = TypeVar("R")

BIAS = 100.0
"""Nats that set tokens apart; e^-100 is nothing to a float32 softmax, and servers refuse more."""

TOP = 20
"""Most log-probs a position that are asked for; vLLM's default limit."""

WAIT = wait_random_exponential(multiplier=0.5, max=20)
"""Seconds before the next try: exponential with full jitter."""

MALFORMED = 5
"""Tries after which a server that answers nonsense is given up, though there is patience left."""


@dataclass(frozen=True)
class Dialect:
    """How an engine's server differs from the others.

    ``owner`` is what its ``/v1/models`` says under owned_by. ``neutral`` goes with every call and switches off what the engine
    would otherwise do to the distribution (defaults of its own, or those of the model's generation config). ``ids``: prompts
    may be ids and stops may be ids; else both are text, which ``tokenize`` (path, name of the field) checks.
    ``logprobs`` says of what distribution the reported log-probs are: ``"sampled"`` the one that is drawn from; ``"tempered"``
    the same before top-p; ``"raw"`` the model's own, of which the whole vocabulary is asked for, so that the rest can
    be computed. ``mend`` tells how to start a server whose log-probs are not that.
    """

    owner: str
    neutral: Mapping[str, object]
    ids: bool
    logprobs: str
    mend: str = ""
    tokenize: tuple[str, str] = ("", "")


DIALECTS = {
    "vllm": Dialect(
        owner="vllm",
        neutral={"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True},
        ids=True,
        logprobs="sampled",
        mend="start vLLM with --logprobs-mode processed_logprobs",
    ),
    "sglang": Dialect(
        owner="sglang",
        neutral={"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "return_token_ids": True},
        ids=True,
        logprobs="tempered",
        mend="start SGLang without RETURN_ORIGINAL_LOGPROB",
    ),
    # llama-cpp-python 0.3: its server takes text prompts only, names tokens by their text, and takes log-probs from the scores
    # before bias and temperature; its default top-k, min-p and repetition penalty are not neutral.
    "llama.cpp": Dialect(
        owner="me",
        neutral={"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0},
        ids=False,
        logprobs="raw",
        tokenize=("/extras/tokenize", "input"),
    ),
}


class Failure(Exception):
    """A call that may succeed when it is tried again: what it counts as, and the seconds that the server asks to wait."""

    def __init__(self, name: str, reason: str, after: float = 0.0) -> None:
        super().__init__(" ".join(reason.split())[:300])
        self.name, self.after, self.when = name, after, time.monotonic()


class _Halted(Exception):
    """The stream was closed; nobody waits for the answer."""


class Server:
    """An address that is asked until it answers. A failed call is counted by its name and tried again: after an exponential
    wait with jitter, or the server's own Retry-After, for ``patience`` seconds from its first failure. ``option`` is what holds
    url and timeout in the config."""

    def __init__(
        self,
        url: str,
        key: str,
        concurrency: int,
        timeout: float,
        patience: float,
        usage: Usage,
        option: str = "backend",
    ) -> None:
        for name, value in (("timeout", timeout), ("patience", patience)):
            if not 0 < value < math.inf:
                raise UserError(f"{option}.{name} is {value}; it must be a number of seconds above 0")
        try:
            parts = httpx2.URL(url)
        except httpx2.InvalidURL:
            parts = httpx2.URL("")
        if parts.scheme not in ("http", "https") or not parts.host:
            raise UserError(f"{option}.url is {url!r}; give one like http://localhost:8000")
        self.url, self.patience, self.usage = url.rstrip("/").removesuffix("/v1"), patience, usage
        self.timeout, self.reloaded, self.option = timeout, False, option
        self.lock = threading.Lock()
        self._client = httpx2.Client(
            base_url=self.url,
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx2.Limits(max_connections=concurrency, max_keepalive_connections=concurrency),
        )

    def call(self, path: str, body: object, read: Callable[[Any], T], halt: threading.Event) -> T:
        """GET (``body`` None) or POST JSON, and what ``read`` makes of the JSON that comes back; it raises :class:`Failure` if
        that is nonsense. :class:`Unavailable` when patience is out, :class:`UserError` at once if the server refuses the
        request."""
        failures: list[Failure] = []

        def attempt() -> T:
            if halt.is_set():
                raise _Halted
            try:
                return read(self._once(path, body))
            except Failure as failure:
                failures.append(failure)
                with self.lock:
                    self.usage.failures[failure.name] += 1
                words = f"{failure.name} ({str(failure)[:100]})"
                warnings.warn(f"{self.url}: {words}; calls are tried again for {self.patience:g} s", stacklevel=2)
                raise

        def left() -> float:
            return self.patience - (failures[-1].when - failures[0].when)

        def stop(state: RetryCallState) -> bool:
            return left() <= 0 or sum(f.name == "malformed" for f in failures) >= MALFORMED

        def wait(state: RetryCallState) -> float:
            return min(max(WAIT(state), failures[-1].after), left())

        retrying = Retrying(
            retry=retry_if_exception_type(Failure), stop=stop, wait=wait, sleep=sleep_using_event(halt), reraise=True
        )
        try:
            return retrying(attempt)
        except Failure as failure:
            raise Unavailable(
                f"{self.url}{path} failed {len(failures)} times, last with {failure.name}: {failure}; what is finished is kept: "
                "mend or start the server, and run again"
            ) from failure

    def _once(self, path: str, body: object) -> Any:
        with self.lock:
            self.usage.calls += 1
        deadline, content = time.monotonic() + self.timeout, bytearray()
        try:
            # httpx's timeout is that of one read, so a server that dribbles its answer would never meet it.
            with self._client.stream("GET" if body is None else "POST", path, json=body) as reply:
                for part in reply.iter_bytes():
                    content += part
                    if time.monotonic() > deadline:
                        raise httpx2.ReadTimeout("it dribbles")
        except httpx2.TimeoutException as error:
            raise Failure("timeout", f"no answer within {self.option}.timeout ({type(error).__name__})") from error
        except httpx2.ConnectError as error:
            if self.reloaded:
                raise UserError(
                    f"{self.url} went away after its weights were replaced, so nobody knows which it serves when it is back; "
                    "start it and run again"
                ) from error
            raise Failure("connection", str(error)) from error
        except httpx2.RequestError as error:
            raise Failure("connection", f"{type(error).__name__}: {error}") from error
        text = content.decode(errors="replace")
        if reply.status_code == 429 or reply.status_code >= 500:
            raise Failure(f"http_{reply.status_code}", text, _seconds(reply.headers.get("Retry-After", "")))
        if reply.status_code != 200:
            words = " ".join(text.split())[:300]
            raise UserError(f"{self.url}{path} refuses the request ({reply.status_code}): {words or 'no reason given'}")
        try:
            return json.loads(content) if content else None
        except ValueError as error:
            raise Failure("malformed", f"no JSON: {text[:100]}") from error


def in_threads(
    work: Callable[[T, threading.Event], R], more: Callable[[int], Sequence[T]], most: int
) -> Generator[list[tuple[int, R]], None, None]:
    """What ``work`` makes of items, ``most`` at a time: ``more(room)`` gives at most ``room`` further ones, and each list that is
    yielded holds (how manyth item, result) of those that are ready. Raises what ``work`` raises. At the end, an early one too,
    the event that ``work`` is given is set, and nobody waits for what is under way."""
    # Daemon threads and two queues, not a ThreadPoolExecutor: the interpreter joins that one's threads at its end, so after
    # Ctrl-C it would hang for as long as the slowest call.
    halt = threading.Event()
    asked: queue.SimpleQueue[tuple[int, T] | None] = queue.SimpleQueue()
    ready: queue.SimpleQueue[tuple[int, R | Exception]] = queue.SimpleQueue()

    def run() -> None:
        while (given := asked.get()) is not None:
            number, item = given
            try:
                ready.put((number, work(item, halt)))
            except _Halted:
                return
            except Exception as error:  # noqa: BLE001  the border of a thread: it is raised below
                ready.put((number, error))

    count = threads = waiting = 0
    try:
        while (fresh := more(most - waiting)) or waiting:
            for item in fresh:
                asked.put((count, item))
                count, waiting = count + 1, waiting + 1
                if threads < waiting:
                    threading.Thread(target=run, daemon=True).start()
                    threads += 1
            answers = [ready.get()]
            while not ready.empty():
                answers.append(ready.get())
            waiting -= len(answers)
            found: list[tuple[int, R]] = []
            for number, answer in answers:
                if isinstance(answer, Exception):
                    raise answer
                found.append((number, answer))
            yield found
    finally:
        halt.set()
        for _ in range(threads):
            asked.put(None)


def _seconds(retry_after: str) -> float:
    """Seconds of a Retry-After header, which holds a number or a date (RFC 9110); 0 for anything else."""
    if retry_after.isdecimal():
        return float(retry_after)
    try:
        return max(parsedate_to_datetime(retry_after).timestamp() - time.time(), 0.0)
    except ValueError:
        return 0.0


def _cards(data: Any) -> list[Mapping[str, Any]]:
    """The models that a server lists."""
    cards = data.get("data") if isinstance(data, Mapping) else None
    if not isinstance(cards, list) or not all(isinstance(card, Mapping) for card in cards):
        raise Failure("malformed", f"/v1/models lists no models: {str(data)[:100]}")
    return cards


class _Reply(NamedTuple):
    """What one call wrote: ids and their reported log-probs, those of the likeliest tokens by text, whether it came to a stop
    by itself, and how many positions of the prompt came from the server's cache."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tops: tuple[Mapping[str, float], ...]
    stopped: bool
    cached: int


@dataclass
class _Writing:
    """A completion under way: all ids so far, and the positions that went through the model for them."""

    request: Request
    halt: threading.Event
    context: list[int]
    computed: int = 0
    segments: list[Segment] = field(default_factory=list)

    @property
    def count(self) -> int:
        return len(self.context) - len(self.request.prompt)

    @property
    def temperature(self) -> float:
        """That of the log-probs: greedy decoding reports them at temperature 1."""
        return self.request.sampling.temperature or 1.0

    def rng(self) -> random.Random:
        """Randomness from the request's seed and the position alone."""
        return random.Random(f"{self.request.seed} {self.count}")


class RemoteBackend(TokenizedBackend):
    """Asks a server that was started apart, ``concurrency`` requests at a time; it may be restarted meanwhile.

    Greedy completions are those of the same weights in process. Sampled contents are drawn by the server, so they are
    repeatable as far as its ``seed`` is.

    Args:
        url: the server's address, with or without ``/v1``.
        model: the name that it serves the model under.
        tokenizer: Hugging Face folder, ``pkg:`` path or hub name of the same model; only tokenizer and configs are read.
        tokens: functional-token table (YAML); None is the paper's.
        mask: functional tokens that are never legal (masking verify and refine at inference, say).
        concurrency: requests in flight.
        timeout: seconds that one call may take.
        patience: seconds of failures that a call outlives, so that the server may be restarted.
        dialect: "vllm", "sglang" or "llama.cpp" (llama-cpp-python's server); "auto" asks the server.
        api_key_env: name of the environment variable that holds the server's API key, if it wants one.
        reload_path: where :meth:`reload` posts; SGLang's by default.
        reload_body: the JSON that it posts, ``{folder}`` in a text stands for the folder of the weights; None is SGLang's.
    """

    def __init__(
        self,
        url: str,
        model: str,
        tokenizer: str,
        tokens: str | None = None,
        mask: Sequence[str] = (),
        concurrency: int = 64,
        timeout: float = 600.0,
        patience: float = 900.0,
        dialect: str = "auto",
        api_key_env: str = "RFTT_API_KEY",
        reload_path: str = "/update_weights_from_disk",
        reload_body: dict[str, Any] | None = None,
    ) -> None:
        if dialect not in ("auto", *DIALECTS):
            raise UserError(f"backend.dialect is {dialect!r}; use one of auto, {', '.join(DIALECTS)}")
        table = read_table(tokens, mask)
        if table.as_text:
            raise UserError(f"the tags of {tokens} are text, which is sampled in process alone; use HFBackend")
        read, width, ends, limit = _read_tokenizer(tokenizer)
        self._bind(read, table, width, ends, limit, concurrency)
        self.model, self.auto = model, dialect == "auto"
        self.dialect = DIALECTS["vllm" if self.auto else dialect]
        self.reload_path, self.reload_body = reload_path, reload_body or {"model_path": "{folder}"}
        self.name = f"{model} (served)"  # not the address: a run may go on at another
        self._server = Server(url, os.environ.get(api_key_env, ""), concurrency, timeout, patience, self.usage)
        self._met, self._flying = False, 0
        self._bias = lru_cache(maxsize=None)(self._forbidden)
        self._name_pieces()

    # -- many requests -------------------------------------------------------------------------------------------------

    def generate(self, requests: Sequence[Request]) -> list[Completion]:
        return collect(self, requests)

    def stream(self, more: Callable[[int], Sequence[Request]]) -> Iterator[list[tuple[int, Completion]]]:
        waiting, began = 0, time.monotonic()

        def checked(room: int) -> Sequence[Request]:
            nonlocal waiting, began
            fresh = more(room)
            if fresh and not waiting:
                began = time.monotonic()
            for request in fresh:
                self._meet(threading.Event())
                self._refuse(request)
            waiting, self._flying = waiting + len(fresh), self._flying + len(fresh)
            return fresh

        try:
            with closing(in_threads(self._answer, checked, self.batch_size)) as answers:
                for ready in answers:
                    waiting, self._flying = waiting - len(ready), self._flying - len(ready)
                    if not waiting:
                        self.usage.seconds["model"] += time.monotonic() - began
                    yield ready
        finally:
            self._flying -= waiting
            if waiting:
                self.usage.seconds["model"] += time.monotonic() - began

    def reload(self, folder: str, version: int) -> None:
        """Have the server load the weights in ``folder`` (a path of its own), and count what it writes from now on as policy
        ``version``. Raises :class:`UserError` while requests are under way, whose segments would be of two policies."""
        if self._flying:
            raise UserError(f"{self._flying} requests are under way; reload when their answers are in")

        def loaded(data: Any) -> None:
            if isinstance(data, Mapping) and data.get("success") is False:
                raise UserError(f"{self._server.url} cannot load {folder}: {str(data.get('message'))[:300]}")

        body = {k: v.replace("{folder}", folder) if isinstance(v, str) else v for k, v in self.reload_body.items()}
        self._server.call(self.reload_path, body, loaded, threading.Event())
        self._server.call("/v1/models", None, _cards, threading.Event())
        self.version, self._server.reloaded = version, True

    # -- meeting the server --------------------------------------------------------------------------------------------

    def _meet(self, halt: threading.Event) -> None:
        """Ask the server who it is, the first time, and prove that what its dialect says of log-probs holds."""
        if self._met:
            return
        cards = self._server.call("/v1/models", None, _cards, halt)
        card = next((card for card in cards if card.get("id") == self.model), None)
        if card is None:
            served = ", ".join(str(card.get("id")) for card in cards)[:300]
            raise UserError(f"{self._server.url} serves {served or 'nothing'}, not {self.model!r}; set backend.model")
        if self.auto:
            known = {dialect.owner: dialect for dialect in DIALECTS.values()}
            if card.get("owned_by") not in known:
                raise UserError(
                    f"cannot tell which engine {self._server.url} is (owned_by {str(card.get('owned_by'))[:50]!r}); set "
                    f"backend.dialect to one of {', '.join(DIALECTS)}"
                )
            self.dialect = known[card["owned_by"]]
        if isinstance(length := card.get("max_model_len"), int):
            self.limit = min(self.limit, length)
        self._prove(halt)
        self._met = True

    def _name_pieces(self) -> None:
        """The texts by which servers name tokens, of all ids that the grammar allows anywhere; and back, where that is clear."""
        allowed = self.vocabulary.allowed_SV.any(0).nonzero()[:, 0].tolist()
        texts = [self.tokenizer.decode([i], skip_special_tokens=False) for i in allowed]
        times = Counter(texts)
        self._pieces = dict(zip(allowed, texts, strict=True))
        self._ids = {text: i for i, text in self._pieces.items() if times[text] == 1}

    def _prove(self, halt: threading.Event) -> None:
        """Raise :class:`UserError` unless log-probs are of the distribution that the dialect says. Where bias and temperature
        are in them, a few tokens alone have all the mass, and half the temperature doubles their distances."""
        twins = sorted(set(self._pieces) - set(self._ids.values()))
        if self.dialect.logprobs == "raw":
            if twins:
                raise UserError(
                    f"{self._server.url} names tokens by their text, and {len(twins)} have that of another (id {twins[0]} is "
                    f"{self._pieces[twins[0]]!r}), so no log-prob could be exact; serve this model by vLLM or SGLang"
                )
            return
        plain = sorted(set(self._pieces) - set(self.ends))
        pair = [plain[0], plain[-1]]
        work = _Writing(Request((plain[0],), 0, 1), halt, [plain[0]])
        replies = [self._ask(work, pair, 1, sampling=Sampling(heat)) for heat in (1.0, 0.5)]
        warm, cold = (sorted(reply.tops[0].values())[-2:] for reply in replies)
        doubled = log_softmax([2 * x for x in warm])
        if abs(logsumexp(warm)) > 1e-3 or abs(math.exp(cold[-1]) - math.exp(doubled[-1])) > 1e-3:
            raise UserError(
                f"{self._server.url} reports log-probs of another distribution than it samples from (without logit_bias or "
                f"temperature), so they could not be exact; {self.dialect.mend}"
            )

    def _refuse(self, request: Request) -> None:
        """Raise :class:`UserError` if the server could not answer, or not exactly."""
        self.check(request)
        top_p = request.sampling.top_p
        if top_p < 1 and (self.dialect.logprobs != "sampled" or request.sampling.temperature == 0):
            raise UserError(
                f"sampling.top_p is {top_p}; log-probs under top-p are exact only from vLLM at a temperature above 0; "
                "set sampling.top_p to 1"
            )

    # -- one request ---------------------------------------------------------------------------------------------------

    def _answer(self, request: Request, halt: threading.Event) -> Completion:
        if len(request.prompt) >= self.limit:
            return self.unwritten(request)
        work = _Writing(request, halt, list(request.prompt))
        return self._free(work) if request.after is None else self._functional(work, request.after)

    def _free(self, work: _Writing) -> Completion:
        ids, logprobs, ended = self._content(work, 0, self.ends, self._room(work, 0))
        chosen = (int(Provenance.SAMPLED),) * len(ids)
        tag, text = work.request.force or "", self.text(ids)
        segment = Segment(tag, ids, logprobs, chosen, text, ended, {}, self.version)
        return Completion((segment,), {}, work.computed, Finish.STOP if ended else self._cut(work))

    def _functional(self, work: _Writing, after: str) -> Completion:
        request = work.request
        first = self._priors(work, after)
        priors: Mapping[str, float] = first
        while True:
            segment = self._segment(work, priors, None if work.segments else request.force)
            work.segments.append(segment)
            priors = segment.priors
            last = self.tokens.terminal(segment.tag) or len(work.segments) == request.segments
            if segment.closed and last:
                finish = Finish.STOP
                break
            if not segment.closed or self._room(work, 0) < 1:
                finish = self._cut(work)
                break
        return Completion(tuple(work.segments), first, work.computed, finish)

    def _room(self, work: _Writing, inside: int) -> int:
        """Tokens that may still be written in a segment that has ``inside``."""
        left = min(work.request.max_tokens - work.count, self.limit - len(work.context))
        return min(left, work.request.sampling.max_segment_tokens - inside)

    def _cut(self, work: _Writing) -> Finish:
        """Which budget is spent."""
        if work.count >= work.request.max_tokens:
            return Finish.LENGTH
        return Finish.CONTEXT if len(work.context) >= self.limit else Finish.SEGMENT

    def _segment(self, work: _Writing, priors: Mapping[str, float], force: str | None) -> Segment:
        """Write one segment at the end of the context, and ask for the priors after it."""
        sampling = work.request.sampling
        if force:
            tag, logprob, first = force, math.log(priors.get(force) or math.ulp(0.0)), work.request.forced_as
        else:
            tag, logprob = _choose(priors, sampling, work.rng())
            first = Provenance.ARGMAX if sampling.boundary == "argmax" else Provenance.SAMPLED
        number = self.vocabulary.names.index(tag)
        opening, closing = self.vocabulary.opens[number], self.vocabulary.closes[number]
        work.context.append(opening)
        content, logprobs, closed = self._content(work, 1 + number, [closing], self._room(work, 1))
        followed = closed and not self.tokens.terminal(tag) and len(work.context) < self.limit
        return Segment(
            tag=tag,
            tokens=(opening, *content),
            logprobs=(logprob, *logprobs),
            provenance=(int(first), *[int(Provenance.SAMPLED)] * len(content)),
            text=self.text(content[:-1] if closed else content),
            closed=closed,
            priors=self._priors(work, tag) if followed else {},
            version=self.version,
        )

    def _priors(self, work: _Writing, after: str) -> dict[str, float]:
        """Probabilities of the legal tags at a boundary. Those that a reply leaves out are asked for anew beside one that
        is known, which tells their scale."""
        opens = {tag: self.vocabulary.opens[self.vocabulary.names.index(tag)] for tag in self.tokens.legal(after)}
        found: dict[str, float] = {}
        while missing := [tag for tag in opens if tag not in found]:
            known = sorted(found, key=found.__getitem__)[-1:]
            asked = {self._pieces[opens[tag]]: tag for tag in (*known, *missing)}
            reply = self._ask(work, [opens[tag] for tag in asked.values()], 1)
            top = {asked[piece]: x for piece, x in reply.tops[0].items() if piece in asked}
            if not set(top) - set(known) or not set(top) >= set(known):
                raise UserError(
                    f"{self._server.url} tells no log-prob of <{missing[0]}>, which may follow {after}; backend.tokenizer must "
                    "be of the model that it serves, and it must report 2 or more log-probs a token"
                )
            shift = found[known[0]] - top[known[0]] if known else 0.0
            found |= {tag: x + shift for tag, x in top.items() if tag in missing}
        ordered = sorted(opens, key=opens.__getitem__)
        logprobs = log_softmax([found[tag] / work.temperature for tag in ordered])
        return {tag: math.exp(x) for tag, x in zip(ordered, logprobs, strict=True) if math.exp(x) > 0}

    def _content(
        self, work: _Writing, state: int, stops: Sequence[int], room: int
    ) -> tuple[tuple[int, ...], tuple[float, ...], bool]:
        """Write at most ``room`` tokens in a grammar state: ids, their log-probs, and whether one of ``stops`` ended them. A
        closing tag is one of the ids, the end of a turn (state 0) is not."""
        ids: list[int] = []
        logprobs: list[float] = []
        ended = False
        while not ended and len(ids) < room:
            # More than once only if it stopped at a text that spells the closing tag by ordinary tokens.
            reply = self._ask(work, state, room - len(ids), stops, work.request.sampling)
            written, scores = list(reply.ids), self._exact(reply, state, work.temperature)
            at_stop = bool(written) and written[-1] in stops  # whatever reason it gives: the room may end there, too
            ended = at_stop or (state == 0 and reply.stopped)
            if state == 0 and at_stop:
                written.pop()
            ids += written
            logprobs += scores[: len(written)]
            work.context += written
        return tuple(ids), tuple(logprobs), ended

    def _exact(self, reply: _Reply, state: int, temperature: float) -> Sequence[float]:
        """Log-probs of the distribution that was drawn from: raw ones are masked and tempered here, over all allowed tokens."""
        if self.dialect.logprobs != "raw":
            return reply.logprobs
        names = [self._pieces[i] for i in self.vocabulary.allowed_SV[state].nonzero()[:, 0].tolist()]
        width, found = len(self.vocabulary.after_V), []
        for token, top in zip(reply.ids, reply.tops, strict=True):
            lacking = [name for name in names if name not in top]
            # llama.cpp names control tokens by the empty text: clear where all other names are there, once each.
            if lacking and (len(lacking) > 1 or "" not in top or len(top) < width):
                raise UserError(
                    f"{self._server.url} tells no log-prob of {lacking[0]!r} ({len(lacking)} tokens in all), so none could be "
                    "exact; serve this model by vLLM or SGLang"
                )
            scores = [top.get(name, top.get("", 0.0)) / temperature for name in names]
            found.append(min(float(top[self._pieces[token]] / temperature - logsumexp(scores)), 0.0))
        return found

    def _forbidden(self, state: int) -> dict[str, float]:
        return {str(i): -BIAS for i in (~self.vocabulary.allowed_SV[state]).nonzero()[:, 0].tolist()}

    # -- one call ------------------------------------------------------------------------------------------------------

    def _ask(
        self,
        work: _Writing,
        allowed: int | Sequence[int],
        room: int,
        stops: Sequence[int] = (),
        sampling: Sampling = Sampling(),
    ) -> _Reply:
        """Continue the context by at most ``room`` tokens out of ``allowed``: those of a grammar state, or a few ids."""
        inside = isinstance(allowed, int)
        bias = self._bias(allowed) if isinstance(allowed, int) else {str(i): BIAS for i in allowed}
        likely = 1 if inside else min(len(bias), TOP)
        ends = {"stop_token_ids": list(stops)} if self.dialect.ids else {"stop": [self._pieces[i] for i in stops]}
        body = {
            "model": self.model,
            "prompt": work.context if self.dialect.ids else self._prompt(work),
            "max_tokens": room,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": work.rng().getrandbits(31),
            "frequency_penalty": 0.0,
            "presence_penalty": 0.0,
            "logit_bias": bias,
            "logprobs": len(self.vocabulary.after_V) if self.dialect.logprobs == "raw" else likely,
            **ends,
            **self.dialect.neutral,
        }

        def read(data: Any) -> _Reply:
            reply = self._read(data, room)
            for token in reply.ids:
                if (str(token) in bias) == inside:  # inside, the bias names what is forbidden, else what is allowed
                    raise Failure("malformed", f"it wrote token {token}, which logit_bias forbids")
            if not reply.ids and not (allowed == 0 and reply.stopped):
                raise Failure("malformed", "it wrote no token")
            return reply

        reply = self._server.call("/v1/completions", body, read, work.halt)
        work.computed += len(work.context) - reply.cached + max(len(reply.ids) - 1, 0)
        with self._server.lock:
            self.usage.reused += reply.cached
        return reply

    def _prompt(self, work: _Writing) -> str:
        """The text that the server reads as exactly the ids of the context."""
        context, (path, name) = work.context, self.dialect.tokenize
        text = self.tokenizer.decode(context, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        ids = self._server.call(path, {"model": self.model, name: text}, _tokens, work.halt)
        if ids != context:
            pairs = enumerate(zip(ids, context, strict=False))
            place = next((i for i, (theirs, ours) in pairs if theirs != ours), min(len(ids), len(context)))
            raise UserError(
                f"{self._server.url} takes prompts as text only, and reads this one otherwise than it was written (at token "
                f"{place}, near {self.text(context[max(place - 2, 0) : place + 3])!r}); serve this model by vLLM or SGLang"
            )
        return text

    def _read(self, data: Any, room: int) -> _Reply:
        """A completion's JSON, every number of it checked. Raises :class:`Failure` if any is not what it must be."""
        try:
            (choice,) = data["choices"]
            scores, reason = choice["logprobs"], choice["finish_reason"]
            pieces, logprobs, tops = scores["tokens"], scores["token_logprobs"], scores["top_logprobs"]
            ids = choice.get("token_ids")
            if ids is None:
                ids = [self._id(piece) for piece in pieces]
            usage = data.get("usage") or {}
            cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            count = usage.get("completion_tokens", len(ids))
            if count != len(ids):  # llama-cpp-python keeps silent about its BOS
                raise ValueError(f"it wrote {count} tokens and tells {len(ids)}")
            if reason not in ("stop", "length") or (reason == "length" and len(ids) != room):
                raise ValueError(f"it ended with {reason!r} after {len(ids)} of {room} tokens")
            if not len(ids) == len(logprobs) == len(tops) <= room:
                raise ValueError(f"{len(ids)} tokens of {room}, {len(logprobs)} log-probs, {len(tops)} top log-probs")
            if not all(isinstance(i, int) and 0 <= i < len(self.vocabulary.after_V) for i in ids):
                raise ValueError(f"ids out of range: {ids}")
            if not all(-math.inf < x <= 1e-3 for x in (*logprobs, *(x for top in tops for x in top.values()))):
                raise ValueError("log-probs that are none")
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise Failure("malformed", f"{type(error).__name__}: {error}") from error
        return _Reply(tuple(ids), tuple(min(x, 0.0) for x in logprobs), tuple(tops), reason == "stop", cached)

    def _id(self, piece: str) -> int:
        """The id that a server means by a token's text."""
        if piece not in self._ids:
            raise UserError(
                f"{self._server.url} returns no token ids, and {piece!r} is not the text of exactly one token of "
                "backend.tokenizer; use a vLLM or SGLang that knows return_token_ids"
            )
        return self._ids[piece]


def _tokens(data: Any) -> list[int]:
    tokens = data.get("tokens") if isinstance(data, Mapping) else None
    if not isinstance(tokens, list):
        raise Failure("malformed", f"no tokens: {str(data)[:100]}")
    return tokens


def _choose(priors: Mapping[str, float], sampling: Sampling, rng: random.Random) -> tuple[str, float]:
    """A functional token, and its log-prob among those that are not pruned."""
    best = max(priors, key=priors.__getitem__)
    likely = {tag: p for tag, p in priors.items() if p >= sampling.min_prior or tag == best}
    greedy = sampling.boundary == "argmax" or sampling.temperature == 0
    tag = best if greedy else rng.choices(list(likely), list(likely.values()))[0]
    return tag, math.log(likely[tag] / math.fsum(likely.values()))


def _read_tokenizer(path: str) -> tuple[PreTrainedTokenizerBase, int, list[int], int]:
    """Tokenizer, width of the logits, ids that end a turn, and positions, from a folder without weights."""
    where = resolve(path)
    try:
        tokenizer, config = AutoTokenizer.from_pretrained(where), AutoConfig.from_pretrained(where).get_text_config()
        ending: Any = config
        with suppress(OSError):  # a model need not have one
            ending = GenerationConfig.from_pretrained(where)
    except (OSError, ValueError, KeyError, ImportError) as error:
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"cannot load tokenizer and config from {path!r}: {reason}") from error
    highest = max(tokenizer.get_vocab().values())
    if highest >= config.vocab_size:
        raise UserError(
            f"{path}: the tokenizer has ids up to {highest}, the model only {config.vocab_size} rows: they are not of one "
            "vocabulary; give a folder in which both were saved together"
        )
    limit = getattr(config, "max_position_embeddings", None) or 1 << 30
    return tokenizer, config.vocab_size, end_ids(tokenizer, ending), limit
