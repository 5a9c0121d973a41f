"""``rftt prm``: a process reward model of one's own (``fit``, ``validate``), and a server for any (``serve``)."""

from __future__ import annotations

from typing import ClassVar

from rftt_lightning.app.command import Parser, run_command
from rftt_lightning.app.sft import SFTCLI, train
from rftt_lightning.core.contracts import UserError
from rftt_lightning.policy.prm import LocalPRM
from rftt_lightning.training.prm import PRMModule, ValueDataModule

SUBCOMMANDS = {
    "fit": "fit a process reward model on the values of stored trees",
    "validate": "measure one on the trees kept for validation",
    "serve": "serve one: POST /score, GET /health",
}
"""Name -> one line of help."""


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

        from rftt_lightning.app.prm_server import create_app
    except ImportError as error:
        raise UserError("rftt prm serve needs fastapi and uvicorn: pip install 'rftt-lightning[prm]'") from error
    print(f"serving {scorer.name} at http://{host}:{port}", flush=True)
    try:
        uvicorn.run(create_app(scorer, max_paths, max_bytes), host=host, port=port, log_level="warning")
    except SystemExit as error:  # uvicorn has said why
        raise UserError(f"cannot listen at {host}:{port}; give another --host or --port") from error


class PRMCLI(SFTCLI):
    OUT: ClassVar[str] = "runs/prm"


def _parser() -> Parser:
    """What the subcommands are; LightningCLI knows of its own two alone."""
    parser = Parser(prog="rftt prm", description="A process reward model: fit one on stored trees, or serve any.")
    commands = parser.add_subcommands()
    for name, text in SUBCOMMANDS.items():
        commands.add_subcommand(name, Parser(), help=text)
    return parser


def main(args: list[str]) -> int | None:
    if args[:1] == ["serve"]:
        return run_command(serve, args[1:], "rftt prm serve")
    if not {"fit", "validate"}.intersection(args):
        _parser().parse_args(args)  # prints the help, or raises
    return train(PRMCLI, PRMModule, ValueDataModule, args)
