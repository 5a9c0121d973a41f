"""``rftt prm``: a process reward model of one's own (``fit``, ``validate``), and a server for any (``serve``)."""

from __future__ import annotations

import asyncio
import threading
from typing import Any, ClassVar

from rftt_lightning.app.command import one_line, run_command
from rftt_lightning.app.sft import SFTCLI, train
from rftt_lightning.core.contracts import Problem, Step, UserError
from rftt_lightning.policy.prm import LocalPRM
from rftt_lightning.training.prm import PRMModule, ValueDataModule


def serve(
    scorer: LocalPRM,
    host: str = "127.0.0.1",
    port: int = 8100,
    max_paths: int = 256,
    max_bytes: int = 4 * 2**20,
) -> None:
    """Serve a process reward model: POST /score with questions and steps, GET /health.

    Args:
        scorer: the model, a StepTagPRM or a StepClassifierPRM.
        host: address to listen at; others than this machine's own reach 0.0.0.0, and nothing asks who they are.
        port: port to listen at, 0 for any that is free.
        max_paths: paths in a request.
        max_bytes: length of a request.
    """
    if min(max_paths, max_bytes) < 1:
        raise UserError(f"max_paths is {max_paths}, max_bytes {max_bytes}; both must be at least 1")
    try:
        import uvicorn
    except ImportError as error:
        raise UserError("rftt prm serve needs fastapi and uvicorn: pip install 'rftt-lightning[prm]'") from error
    print(f"serving {scorer.name} at http://{host}:{port}", flush=True)
    try:
        uvicorn.run(create_app(scorer, max_paths, max_bytes), host=host, port=port, log_level="warning")
    except SystemExit as error:  # uvicorn has said why
        raise UserError(f"cannot listen at {host}:{port}; give another --host or --port") from error


def create_app(scorer: LocalPRM, max_paths: int, max_bytes: int) -> Any:
    """The FastAPI application. A request that is no such is answered 422, one that is too long 413, each with one line."""
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse
    from pydantic import BaseModel, ConfigDict, Field, ValidationError

    class Path(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        question: str
        steps: list[tuple[str, str]] = Field(strict=False)

    class Paths(BaseModel):
        model_config = ConfigDict(extra="forbid", strict=True)
        paths: list[Path] = Field(max_length=max_paths)

    app = FastAPI(title="rftt prm")
    turn = threading.Lock()  # one batch at a time has the model

    def score(paths: Paths) -> list[tuple[float | None, ...]]:
        asked = [(Problem("", path.question), [Step(*step) for step in path.steps]) for path in paths.paths]
        with turn:
            return scorer.score(None, asked)

    def refuse(status: int, reason: str) -> JSONResponse:
        return JSONResponse({"detail": reason}, status)

    @app.get("/health")
    def health() -> dict[str, Any]:
        return {"model": scorer.name, "limit": scorer.limit, "max_paths": max_paths, "max_bytes": max_bytes}

    @app.post("/score")
    async def post(request: Request) -> JSONResponse:
        body = bytearray()
        async for part in request.stream():  # whatever its header says
            body += part
            if len(body) > max_bytes:
                return refuse(413, f"a request is at most {max_bytes} bytes long; send fewer paths")
        try:
            paths = Paths.model_validate_json(bytes(body))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            return refuse(422, one_line(f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}"))
        return JSONResponse({"scores": await asyncio.to_thread(score, paths)})

    return app


class PRMCLI(SFTCLI):
    OUT: ClassVar[str] = "runs/prm"


def main(args: list[str]) -> int | None:
    if args[:1] == ["serve"]:
        return run_command(serve, args[1:], "rftt prm serve")
    return train(PRMCLI, PRMModule, ValueDataModule, args)
