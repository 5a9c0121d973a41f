"""The served backend against a real engine: llama-cpp-python's server on the tiny model, written as GGUF."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from test_remote import QUESTIONS, assert_same, expanders, expected_logprobs, questions, shape, trees

from fake_server import taught
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.policy.remote import RemoteBackend

PYTHON = os.environ.get("RFTT_LLAMA_PYTHON") or sys.executable
NEEDED = "import llama_cpp.server.app, gguf"
FLAGS = "--model_alias tiny --logits_all true --n_ctx 1024 --type_k 0 --type_v 0 --n_threads 1 --n_threads_batch 1"
"""Log-probs need all logits; keys and values in float32 (type 0), since float16 moves log-probs by up to 0.01."""

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*calls are tried again")]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    found = subprocess.run([PYTHON, "-c", NEEDED], capture_output=True, text=True, check=False)
    if found.returncode:
        pytest.skip(
            f"{PYTHON} has no llama-cpp-python[server] and gguf; set RFTT_LLAMA_PYTHON to a python that has "
            f"({found.stderr.strip().splitlines()[-1]})"
        )
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def hf(folder) -> HFBackend:
    return taught(folder)


@pytest.fixture(scope="module")
def backend(hf, folder) -> Iterator[RemoteBackend]:
    """A backend on a server that runs as long as this module's tests."""
    words = hf.tokenizer.convert_ids_to_tokens(list(range(hf.model.config.vocab_size)))
    (folder / "tokens.json").write_text(json.dumps(words))
    np.savez(folder / "weights.npz", **{name: value.numpy() for name, value in hf.model.state_dict().items()})
    writer = Path(__file__).parents[1] / "gguf_writer.py"
    subprocess.run([PYTHON, writer, folder, folder / "tiny.gguf"], check=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [PYTHON, "-m", "llama_cpp.server", "--model", str(folder / "tiny.gguf"), "--port", str(port)]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen([*command, *FLAGS.split()], stdout=log, stderr=log)
    try:  # the backend's patience outlasts the engine's start
        yield RemoteBackend(f"http://127.0.0.1:{port}/v1", "tiny", str(folder), concurrency=4, patience=60.0)
    finally:
        server.kill()
        server.wait()


@pytest.mark.parametrize("sampling", [{}, {"boundary": "argmax", "min_prior": 0.1}])
def test_greedy_answers_are_those_of_the_model_in_process(backend, hf, sampling):
    requests = questions(hf, temperature=0.0, **sampling)
    assert_same(backend.generate(requests), hf.generate(requests))


@pytest.mark.parametrize("sampling", [{"temperature": 1.0}, {"temperature": 0.7, "min_prior": 0.1}])
def test_log_probs_are_of_the_distribution_that_was_drawn_from(backend, hf, sampling):
    requests = questions(hf, **sampling)
    for request, completion in zip(requests, backend.generate(requests), strict=True):
        stored = [x for segment in completion.segments for x in segment.logprobs]
        assert stored == pytest.approx(expected_logprobs(hf, request, completion), abs=1e-3)


@pytest.mark.parametrize("kind", [0, 1])
def test_a_greedy_search_grows_the_same_trees(backend, hf, kind):
    found = [shape(tree) for tree in trees(backend, expanders()[kind])]
    assert found == [shape(tree) for tree in trees(hf, expanders()[kind])]
    assert len(found) == len(QUESTIONS)
