"""``rftt prm``: what the server takes and refuses, and an RL run whose PRM dies."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx2
import pytest
import torch
from transformers import AutoModelForTokenClassification

from prm_server import PRMServer
from prm_world import TABLE, paths, save_classifier
from rftt_lightning.app.cli import main
from rftt_lightning.policy.prm import StepClassifierPRM
from rftt_lightning.policy.vocab import add_functional_tokens, load

ROOT = Path(__file__).resolve().parents[2]


# -- server ------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    scorer = StepClassifierPRM(save_classifier(tmp_path_factory.mktemp("prm")))
    server = PRMServer(scorer, max_paths=4, max_bytes=5000)
    yield server
    server.stop()


PATH = {"question": "one two", "steps": [["next_step", "one"], ["output", "two"]]}


def test_health_names_the_model_and_the_limits(server):
    health = httpx2.get(f"{server.url}/health").json()
    assert re.fullmatch(r".+ [0-9a-f]{8}", health["model"])
    assert (health["limit"], health["max_paths"], health["max_bytes"]) == (128, 4, 5000)


def test_scores_are_numbers_in_the_order_of_the_steps(server):
    reply = httpx2.post(f"{server.url}/score", json={"paths": [PATH, {"question": "", "steps": []}]})
    (two, none) = reply.json()["scores"]
    assert reply.status_code == 200 and none == [] and len(two) == 2 and all(0 < s < 1 for s in two)


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"", 422, "body: Invalid JSON"),
        (b"{", 422, "body: Invalid JSON"),
        (b"\xff\xfe", 422, "body: Invalid JSON"),
        (b"[]", 422, "body"),
        (b"{}", 422, "paths: Field required"),
        (b'{"paths": 3}', 422, "paths: Input should be a valid"),
        (json.dumps({"paths": [PATH], "model": "x"}), 422, "model: Extra inputs"),
        (
            json.dumps({"paths": [{"question": 3, "steps": []}]}),
            422,
            r"paths\.0\.question: Input should be a valid string",
        ),
        (json.dumps({"paths": [{"question": "", "steps": ["ab"]}]}), 422, r"paths\.0\.steps\.0"),
        (json.dumps({"paths": [{"question": "", "steps": [["a"]]}]}), 422, r"paths\.0\.steps\.0"),
        (json.dumps({"paths": [PATH] * 5}), 422, "paths: .*at most 4"),
        (json.dumps({"paths": [{"question": "one " * 2000, "steps": []}]}), 413, "at most 5000 bytes"),
    ],
)
def test_bad_requests_are_refused_in_one_line(server, body, status, words):
    reply = httpx2.post(f"{server.url}/score", content=body)
    detail = reply.json()["detail"]
    assert reply.status_code == status and re.search(words, detail) and "\n" not in detail
    assert httpx2.post(f"{server.url}/score", json={"paths": [PATH]}).status_code == 200  # it is none the worse


def test_requests_side_by_side_do_not_mix(server):
    scorer = StepClassifierPRM(httpx2.get(f"{server.url}/health").json()["model"].rpartition(" ")[0])
    asked = [{"question": p.question, "steps": [list(s) for s in steps]} for p, steps in paths(24)]
    found: dict[int, list[float]] = {}

    def ask(i: int) -> None:
        found[i] = httpx2.post(f"{server.url}/score", json={"paths": [asked[i]]}, timeout=30).json()["scores"][0]

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, scores in enumerate(scorer.score(None, paths(24))):
        assert found[i] == pytest.approx(scores, abs=1e-5)


def test_mistakes_at_the_command_line(tmp_path, capfd):
    prm = ["--scorer=StepClassifierPRM", f"--scorer.model={tmp_path}"]
    for args, words in [
        (["serve", *prm], "no model at"),
        (["serve"], "scorer"),
        (["fit", "--model.model=x", "--data.trees=[]"], "data.trees is empty"),
        (["fit", "--model.model=x", "--data.trees=[x]", "--data.estimate=mild"], "data.estimate is 'mild'"),
        (["fit", "--model.model=x", "--data.trees=[x]", "--model.schedule=x"], "model.schedule is 'x'"),
        (["paint"], "'paint' (choose from 'fit', 'validate', 'serve')"),
        ([], "fit,validate,serve"),
    ]:
        assert main(["prm", *args]) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rftt:")]
        assert words in line


def test_help_names_every_subcommand(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["prm", "--help"])
    assert not stop.value.code
    out = capsys.readouterr().out
    assert all(re.search(rf"^ +{name} ", out, re.MULTILINE) for name in ("fit", "validate", "serve"))


# -- an RL run -----------------------------------------------------------------------------------------------------------------


def save_prm(folder: Path) -> str:
    """A PRM that has learned nothing, on the embedded model's vocabulary."""
    torch.manual_seed(0)
    model, tokenizer = load("pkg:tiny/checkpoints/countdown", auto=AutoModelForTokenClassification, num_labels=2)
    add_functional_tokens(model, tokenizer, TABLE)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def start_server(folder: str, port: int) -> subprocess.Popen:
    args = ["prm", "serve", "--scorer=StepClassifierPRM", f"--scorer.model={folder}", f"--port={port}"]
    server = subprocess.Popen([sys.executable, "-m", "rftt_lightning", *args], cwd=ROOT, stderr=subprocess.DEVNULL)
    for _ in range(600):
        try:
            httpx2.get(f"http://127.0.0.1:{port}/health")
            return server
        except httpx2.ConnectError:
            assert server.poll() is None
            time.sleep(0.2)
    raise AssertionError("the server does not start")


def fit(out: Path, port: int) -> int:
    scorer = "--trainer.reward.init_args.process.init_args.scorer"
    return main(
        [
            *["rl", "fit", f"--config={ROOT / 'configs/tiny/rl.yaml'}", f"--trainer.out={out}"],
            *["--model.model=pkg:tiny/checkpoints/countdown", "--trainer.greedy=null"],
            *["--data.train.init_args.count=40", "--data.batch_size=4", "--trainer.max_steps=4"],
            *["--trainer.expander.init_args.rollouts=3", "--trainer.expander.init_args.max_tokens=48"],
            *[f"{scorer}=rftt_lightning.policy.prm.RemotePRM", f"{scorer}.url=http://127.0.0.1:{port}"],
            f"{scorer}.patience=1",
        ]
    )


def lines(out: Path) -> list[dict[str, float]]:
    timed = ("seconds", "share_rollout", "share_score", "share_update", "tokens_per_second")
    read = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in timed} for line in read]


@pytest.fixture
def free_port() -> int:
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        return place.getsockname()[1]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*calls are tried again")
def test_rl_stops_whole_when_its_prm_is_killed_and_goes_on_when_it_is_back(tmp_path, capfd, free_port):
    """The server dies by SIGKILL in the third step, long before the first checkpoint is due."""
    folder = save_prm(tmp_path / "prm")
    server = start_server(folder, free_port)
    try:
        assert fit(tmp_path / "straight", free_port) == 0

        def kill() -> None:
            while not (out / "metrics.jsonl").exists() or len(lines(out)) < 2:
                time.sleep(0.005)
            server.send_signal(signal.SIGKILL)

        out = tmp_path / "cut"
        killer = threading.Thread(target=kill)
        killer.start()
        assert fit(out, free_port) == 2
        killer.join()
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rftt:")]
        assert "/score failed" in line or "/health failed" in line
        assert "what is finished is kept: mend or start the server, and run again" in line
        done = len(lines(out))
        assert 2 <= done < 4 and [path.name for path in (out / "checkpoints").glob("step-*")] == [f"step-{done:06d}.pt"]
        server.wait()
        server = start_server(folder, free_port)
        assert fit(out, free_port) == 0
    finally:
        server.kill()
        server.wait()
    assert lines(out) == lines(tmp_path / "straight")
    weights, again = (
        torch.load(o / "checkpoints/step-000004.pt", weights_only=True)["model"] for o in (tmp_path / "straight", out)
    )
    assert all(torch.equal(weights[name], again[name]) for name in weights)
    assert all(row["step_scores/next_step"] > 0 for row in lines(out) if "step_scores/next_step" in row)
