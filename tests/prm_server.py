"""The PRM server in a thread of the test's own process, with faults on request."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import uvicorn

from rftt_lightning.app.prm_server import create_app


class PRMServer:
    """Runs from its making until :meth:`stop`. The first calls of /score meet ``failures`` (a status, or what is wrong with the
    answer; "dribble" sends a blank every tenth of a second for five seconds); ``sizes`` holds the number of paths of each one that
    was answered; every call takes ``delay`` seconds."""

    def __init__(
        self,
        scorer: Any,
        max_paths: int = 256,
        max_bytes: int = 1 << 20,
        port: int = 0,
        failures: Sequence[int | str] = (),
        delay: float = 0.0,
    ) -> None:
        self.sizes: list[int] = []
        self.failures, self.delay = list(failures), delay
        self.app = create_app(scorer, max_paths, max_bytes)
        self.socket = socket.socket()
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(("127.0.0.1", port))
        self.port = self.socket.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        config = uvicorn.Config(self._faulty, interface="asgi3", log_level="critical", timeout_graceful_shutdown=1)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join()
        self.socket.close()

    async def _faulty(self, scope: Any, receive: Any, send: Any) -> None:
        time.sleep(self.delay)
        if scope["type"] != "http" or scope["path"] != "/score":
            await self.app(scope, receive, send)
        elif self.failures:
            await self._fail(self.failures.pop(0), send)
        else:

            async def counted() -> Any:
                message = await receive()
                body.extend(message.get("body", b""))
                if body and not message.get("more_body"):
                    with suppress(ValueError, TypeError, KeyError):  # bad requests are for the application to refuse
                        self.sizes.append(len(json.loads(body)["paths"]))
                return message

            body = bytearray()
            await self.app(scope, counted, send)

    async def _fail(self, kind: int | str, send: Any) -> None:
        bodies = {"garbage": b"<html>", "shape": b'{"scores": [[]]}', "nan": b'{"scores": [[2.5]]}'}
        status = kind if isinstance(kind, int) else 200
        headers = [(b"content-type", b"application/json")]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        for _ in range(50 if kind == "dribble" else 0):
            await send({"type": "http.response.body", "body": b" ", "more_body": True})
            await asyncio.sleep(0.1)
        await send({"type": "http.response.body", "body": bodies.get(str(kind), b"")})
