"""An engine's server in a thread: the completions of a real (tiny) model, in the dialect of any engine, with faults on demand."""

from __future__ import annotations

import json
import socket
import struct
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from scipy.special import log_softmax
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.policy.vocab import add_functional_tokens, load


def taught(folder: Path) -> HFBackend:
    """The tiny base with functional tokens whose closing ones are likely enough for whole paths, in process; and as a Hugging
    Face folder."""
    table = TokenTable.from_yaml()
    model, tokenizer = load("pkg:tiny/checkpoints/countdown", "float32")
    add_functional_tokens(model, tokenizer, table)
    ids, rows = tokenizer.get_vocab(), model.get_input_embeddings().weight.data
    for token in table.tokens:
        rows[ids[token.close]] += 0.7 * (rows[ids[";"]] + rows[ids["<|end|>"]])
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return HFBackend.live(model, tokenizer, table, batch_size=8)


OWNERS = {"vllm": "vllm", "sglang": "sglang", "llama.cpp": "me"}
REPORTED = {"vllm": "sampled", "sglang": "tempered", "llama.cpp": "raw"}


class FakeServer:
    """Serves ``model`` under the name ``tiny``.

    ``reported`` is the distribution whose log-probs are told: sampled, tempered, masked or raw (the engine's own by default).
    ``most`` log-probs are told a token; ``token_ids``: ids come back; ``obedient``: logit_bias is heeded; ``length`` is that
    of the context. ``faults`` are spent one a completion: 0 (none), a status (500, or 429 with ``retry_after``), "hang",
    "dribble" (an answer that takes as long as "hang", byte by byte), "reset", "garbage", "torn", "fewer" (log-probs than tokens),
    "silent" (about a token), "early" (it stops at no stop), "blank" (it stops at once), "nan", "range", "cut" (it gives up),
    "empty". ``bodies`` keeps all completion requests, ``posts`` all others.
    """

    _known: ClassVar[dict[tuple[int, tuple[int, ...]], np.ndarray]] = {}  # servers of one model share what it said
    _thinking = threading.Lock()

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        engine: str = "vllm",
        reported: str = "",
        most: int = 20,
        token_ids: bool = True,
        obedient: bool = True,
        length: int | None = None,
    ) -> None:
        self.model, self.tokenizer, self.engine, self.most = model, tokenizer, engine, most
        self.reported, self.token_ids, self.obedient = reported or REPORTED[engine], token_ids, obedient
        self.length, self.retry_after, self.hang = length, "0", 1.0
        self.faults: deque[int | str] = deque()
        self.bodies: list[dict[str, Any]] = []
        self.posts: list[tuple[str, Any]] = []
        self.headers: list[Mapping[str, str]] = []
        self.busy = self.busiest = self.port = 0
        self._lock = threading.Lock()
        self._names = [tokenizer.decode([i]) for i in range(model.config.vocab_size)]

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Serve on a free port; after :meth:`stop` on the same one again."""
        self._open: set[socket.socket] = set()
        self._stopped = threading.Event()
        self._http = _Http(("127.0.0.1", self.port), type("Handler", (_Handler,), {"fake": self}))
        self.port = self._http.server_address[1]
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        """As a killed process: connections break off, the port is closed."""
        self._stopped.set()
        self._http.shutdown()
        self._http.server_close()
        for connection in list(self._open):
            _reset(connection)

    # -- what the engine does --------------------------------------------------------------------------------------------

    def cards(self) -> dict[str, Any]:
        card = {"id": "tiny", "object": "model", "owned_by": OWNERS[self.engine]}
        return {"object": "list", "data": [card if self.length is None else {**card, "max_model_len": self.length}]}

    def tokenize(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    @torch.no_grad()
    def logits(self, context: Sequence[int]) -> np.ndarray:
        key = id(self.model), tuple(context)
        with self._thinking:
            if key not in self._known:
                output = self.model(input_ids=torch.tensor([context]), logits_to_keep=1)
                self._known[key] = output.logits[0, -1].double().numpy()
            return self._known[key]

    def complete(self, body: Mapping[str, Any]) -> dict[str, Any]:
        prompt = body["prompt"]
        assert isinstance(prompt, str) == (self.engine == "llama.cpp"), "the prompt is of another dialect"
        context = self.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        stops = {*body.get("stop_token_ids", ()), *(self._names.index(stop) for stop in body.get("stop", ()))}
        repeat = "repeat_penalty" if self.engine == "llama.cpp" else "repetition_penalty"
        off = {"top_k": {0, -1}, "min_p": {0.0}, repeat: {1.0}, "frequency_penalty": {0.0}, "presence_penalty": {0.0}}
        heat = 1.0 if all(body.get(name) in values for name, values in off.items()) else 2.0  # defaults distort somehow
        bias = np.zeros(len(self._names))
        for token, by in body["logit_bias"].items():
            bias[int(token)] = by * self.obedient
        rng = np.random.default_rng(body["seed"])
        ids, logprobs, tops, reason = [], [], [], "length"
        while len(ids) < body["max_tokens"]:
            token, reported = self._draw(self.logits(context) / heat + bias, self.logits(context), body, rng)
            if self.engine == "llama.cpp" and token == self.tokenizer.eos_token_id:
                reason = "stop"
                break
            best = np.argsort(-reported)[: min(body["logprobs"], self.most if self.reported != "raw" else 1 << 30)]
            ids.append(token)
            logprobs.append(float(reported[token]))
            tops.append({self._names[i]: max(float(reported[i]), -9999.0) for i in [*best, token]})
            context.append(token)
            if token in stops:
                full = self.engine == "vllm" and len(ids) == body["max_tokens"]
                reason = "length" if full else "stop"
                break
        choice = {
            "finish_reason": reason,
            "logprobs": {"tokens": [self._names[i] for i in ids], "token_logprobs": logprobs, "top_logprobs": tops},
        }
        if self.token_ids and self.engine != "llama.cpp":
            choice["token_ids"] = ids
        return {
            "choices": [choice],
            "usage": {"completion_tokens": len(ids), "prompt_tokens_details": {"cached_tokens": 1}},
        }

    def _draw(
        self, biased: np.ndarray, raw: np.ndarray, body: Mapping[str, Any], rng: np.random.Generator
    ) -> tuple[int, np.ndarray]:
        """The next token, and the log-probs that are told of it."""
        tempered = log_softmax(biased / (body["temperature"] or 1.0))
        sampled = tempered
        if body["top_p"] < 1 and body["temperature"] > 0:
            order = np.argsort(-tempered)
            mass = np.exp(tempered[order])
            sampled = tempered.copy()
            sampled[order[mass.cumsum() - mass >= body["top_p"]]] = -np.inf
            sampled = log_softmax(sampled)
        drawn = rng.choice(len(sampled), p=np.exp(sampled) / np.exp(sampled).sum())
        token = int(biased.argmax()) if body["temperature"] == 0 else int(drawn)
        told = {"sampled": sampled, "tempered": tempered, "masked": log_softmax(biased), "raw": log_softmax(raw)}
        return token, told[self.reported]


class _Http(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64


def _reset(connection: socket.socket) -> None:
    """Break a connection off without saying goodbye."""
    with suppress(OSError):  # it is gone already
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        connection.shutdown(socket.SHUT_RDWR)


class _Handler(BaseHTTPRequestHandler):
    fake: FakeServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # head and body in one packet: two wait for each other

    def setup(self) -> None:
        super().setup()
        self.fake._open.add(self.connection)

    def finish(self) -> None:
        self.fake._open.discard(self.connection)
        with suppress(OSError):  # broken off
            super().finish()

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._send(200, self.fake.cards() if self.path == "/v1/models" else {})

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path == "/extras/tokenize":
            return self._send(200, {"tokens": fake.tokenize(body["input"])})
        if self.path != "/v1/completions":
            fake.posts.append((self.path, body))
            return self._send(200, {"success": body.get("model_path") != "broken", "message": "no such weights"})
        with fake._lock:
            fake.bodies.append(body)
            fake.headers.append(dict(self.headers))
            fake.busy += 1
            fake.busiest = max(fake.busiest, fake.busy)
            fault = fake.faults.popleft() if fake.faults else None
        try:
            self._answer(fault, body)
        finally:
            with fake._lock:
                fake.busy -= 1

    def _answer(self, fault: int | str | None, body: Mapping[str, Any]) -> None:
        if isinstance(fault, int) and fault:
            return self._send(fault, {"error": f"fault {fault}"}, {"Retry-After": self.fake.retry_after})
        if fault == "hang":
            self.fake._stopped.wait(self.fake.hang)
        if fault == "reset":
            self.close_connection = True
            return _reset(self.connection)
        if fault == "garbage":
            return self._write(200, b"<html>busy</html>", {})
        found = self.fake.complete(body)
        choice = found["choices"][0]
        scores = choice["logprobs"]
        if fault == "fewer":
            scores["token_logprobs"].pop()
        if fault == "silent":
            for column in (*scores.values(), choice["token_ids"]):
                column.pop(0)
        if fault in ("early", "blank"):
            count = int(fault == "early")
            choice["finish_reason"], found["usage"]["completion_tokens"] = "stop", count
            for column in (*scores.values(), choice["token_ids"]):
                del column[count:]
        if fault == "nan":
            scores["token_logprobs"][0] = float("nan")
        if fault == "range":
            choice["token_ids"][0] = 10**6
        if fault == "cut":
            choice["finish_reason"] = "abort"
        if fault == "empty":
            found["choices"] = []
        text = json.dumps(found).encode()
        if fault == "dribble":
            return self._dribble(text)
        if fault == "torn":
            self.close_connection = True
            return self._write(200, text[: len(text) // 2], {"Content-Length": str(len(text))})
        return self._write(200, text, {})

    def _dribble(self, text: bytes) -> None:
        """Blanks at even intervals, then the answer."""
        count = 20
        self._write(200, b"", {"Content-Length": str(count + len(text))})
        for _ in range(count):
            self.fake._stopped.wait(self.fake.hang / count)
            self.wfile.write(b" ")
            self.wfile.flush()
        self.wfile.write(text)

    def _send(self, status: int, data: object, headers: Mapping[str, str] = {}) -> None:
        self._write(status, json.dumps(data).encode(), headers)

    def _write(self, status: int, text: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text)
        self.wfile.flush()
