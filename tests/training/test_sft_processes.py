"""Two processes learn what one does, with whole weights (DDP) and with sharded ones (FSDP2), and resume; asked to stop, they
save together."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback
from safetensors.torch import load_file

from sft_world import save_base, trajectories, write_store

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "tiny" / "sft.yaml"
CHECKPOINT = "lightning.pytorch.callbacks.ModelCheckpoint"
SHARDED = {
    "class_path": "lightning.pytorch.strategies.ModelParallelStrategy",
    "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1},
}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("processes")
    return {"model": save_base(root / "base"), "data": write_store(root / "data", trajectories(45))}


def fit(world, out, batch_size, *options, status=0, **trainer):
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
    out.mkdir(parents=True, exist_ok=True)
    overlay = out / "overlay.yaml"
    overlay.write_text(yaml.safe_dump(config))
    command = ["-m", "rftt_lightning", "sft", "fit", "--config", CONFIG, "--config", overlay, "--out", out, *options]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    done = subprocess.run([sys.executable, *map(str, command)], capture_output=True, text=True, check=False, env=env)
    assert done.returncode == status, done.stderr[-3000:]
    return load_file(out / "hf" / "model.safetensors") if not status else {}


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


class Asked(Callback):
    """Rank zero alone is asked to stop, amid the accumulation of the third step, and is slow to end."""

    def on_train_batch_start(self, trainer, module, batch, number):
        if trainer.is_global_zero and number == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_exception(self, trainer, *args):
        if trainer.is_global_zero:
            time.sleep(8)  # in which Lightning sees how the other rank has ended


@pytest.mark.slow
def test_sharded_processes_that_are_asked_to_stop_save_together_and_go_on(world, tmp_path):
    both = {"devices": 2, "strategy": SHARDED, "accumulate_grad_batches": 2}
    straight = fit(world, tmp_path / "straight", 2, **both)
    out, export = tmp_path / "out", {"class_path": "rftt_lightning.training.callbacks.ExportHF"}
    asked = {"class_path": "training.test_sft_processes.Asked"}
    fit(world, out, 2, status=130, **both, callbacks=[asked, export])
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["interrupted.ckpt"]
    assert torch.load(out / "checkpoints" / "interrupted.ckpt" / "meta.pt", weights_only=True)["global_step"] == 3
    for name, weight in fit(world, out, 2, **both).items():
        assert torch.equal(straight[name], weight), name
