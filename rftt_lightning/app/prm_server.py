"""The application behind ``rftt prm serve``. Needs the extra ``prm``: fastapi (and uvicorn to run it)."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from rftt_lightning.app.command import one_line
from rftt_lightning.core.contracts import Problem, Step
from rftt_lightning.policy.prm import LocalPRM


class Path(BaseModel):
    """``{"question": "3 7 12 target 9", "steps": [["next_step", "3 * 7 = 21 ; 12 21"]]}``"""

    model_config = ConfigDict(extra="forbid")
    question: str
    steps: list[tuple[str, str]]


class Body(BaseModel):
    """What POST /score takes."""

    model_config = ConfigDict(extra="forbid")
    paths: list[Path]


def create_app(scorer: LocalPRM, max_paths: int, max_bytes: int) -> FastAPI:
    """GET /health says what is served and how much a request may hold; POST /score answers ``{"scores": [[0.9, null], …]}``, a
    score in [0, 1] a step. A request that is no such is answered 422, one that is too long 413, each with one line."""
    app = FastAPI(title="rftt prm", openapi_url=None)
    turn = threading.Lock()  # one batch at a time has the model

    def score(paths: list[Path]) -> list[tuple[float | None, ...]]:
        asked = [(Problem("", path.question), [Step(*step) for step in path.steps]) for path in paths]
        with turn:
            return scorer.score(None, asked)

    def refuse(status: int, reason: str) -> JSONResponse:
        return JSONResponse({"detail": one_line(reason)}, status)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"model": scorer.name, "limit": scorer.limit, "max_paths": max_paths, "max_bytes": max_bytes}

    @app.post("/score")
    async def post(request: Request) -> JSONResponse:
        body = bytearray()
        async for part in request.stream():  # whatever its header says of the length
            body += part
            if len(body) > max_bytes:
                return refuse(413, f"a request is at most {max_bytes} bytes long; send fewer paths")
        try:
            paths = Body.model_validate_json(bytes(body)).paths
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            return refuse(422, f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}")
        if len(paths) > max_paths:
            return refuse(422, f"paths: {len(paths)} of them, and a request holds at most {max_paths}")
        return JSONResponse({"scores": await asyncio.to_thread(score, paths)})

    return app
