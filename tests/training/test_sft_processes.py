"""Two processes learn what one does, with whole weights (DDP) and with sharded ones (FSDP2), and resume."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from sft_world import save_base, trajectories, write_store

CONFIG = Path(__file__).resolve().parents[2] / "configs" / "tiny" / "sft.yaml"
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"
SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    return {"model": save_base(root / "base"), "data": write_store(root / "data", trajectories(45))}


def fit(world, out, batch_size, *options, **trainer):
    keep = {"class_path": CHECKPOINT, "init_args": {"every_n_train_steps": 3, "save_top_k": -1, "filename": "{step}"}}
    config = {
        "model": {"model": world["model"], "lr": 1e-3},
        "data": {"folder": world["data"], "batch_size": batch_size},
        "trainer": {
            "max_epochs": 2,
            "max_steps": 12,  # all there are; a run that goes on after them is told apart by their number
            "enable_progress_bar": False,
            "callbacks": [{"class_path": "rftt_lightning.training.callbacks.ExportHF"}, keep],
            **trainer,
        },
    }
    out.mkdir(parents=True)
    overlay = out / "overlay.yaml"
    overlay.write_text(yaml.safe_dump(config))
    command = ["-m", "rftt_lightning", "sft", "fit", "--config", CONFIG, "--config", overlay, "--out", out, *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(out / "hf" / "model.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", SHARDED])
def test_two_processes_learn_what_one_does_and_resume(world, tmp_path, strategy):
    one = fit(world, tmp_path / "one", 8)
    two = fit(world, tmp_path / "two", 4, devices=2, strategy=strategy)
    assert one.keys() == two.keys()
    for name, weight in one.items():
        torch.testing.assert_close(two[name], weight, rtol=1e-3, atol=1e-5, msg=name)
    checkpoint = tmp_path / "two" / "checkpoints" / "step=3.ckpt"
    resumed = fit(world, tmp_path / "resumed", 4, "--ckpt_path", checkpoint, devices=2, strategy=strategy)
    last = tmp_path / "two" / "checkpoints" / "step=12.ckpt"  # of a run that was killed before its export
    finished = fit(world, tmp_path / "finished", 4, "--ckpt_path", last, devices=2, strategy=strategy)
    for name, weight in two.items():
        assert torch.equal(resumed[name], weight) and torch.equal(finished[name], weight), name
