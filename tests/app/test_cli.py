import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from lightning import Callback

from rftt_lightning.app import cli
from rftt_lightning.app.command import one_line, run_command
from rftt_lightning.core.contracts import ProblemSource, Sampling, UserError
from sft_world import save_base, trajectories, write_store

SFT = Path(__file__).resolve().parents[2] / "configs" / "tiny" / "sft.yaml"


def rftt(*args, env=None):
    command = [sys.executable, "-m", "rftt_lightning", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, env={**os.environ, **(env or {})})


# -- the table of commands -------------------------------------------------------------------------------------------------


def test_help_is_fast_and_lists_every_command():
    seconds = []
    for _ in range(3):
        began = time.monotonic()
        done = rftt("--help")
        seconds.append(time.monotonic() - began)
    assert done.returncode == 0
    assert all(f"  {name} " in done.stdout for name in cli.COMMANDS)
    assert min(seconds) < 1.0


def test_version(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("rftt ")


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert not stop.value.code
    assert "usage" in capsys.readouterr().out.lower()


def command(monkeypatch, act):
    module = type(sys)("fake_command")
    module.main = act
    monkeypatch.setitem(sys.modules, "fake_command", module)
    monkeypatch.setitem(cli.COMMANDS, "fake", ("fake_command", ""))


def raising(error):
    def act(args):
        raise error

    return act


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (UserError("no file\nhere; give one"), 2, "rftt: no file here; give one"),
        (KeyboardInterrupt(), 130, "rftt: interrupted"),
        (ZeroDivisionError("by zero"), 1, "rftt: fault: ZeroDivisionError: by zero (traceback in "),
    ],
)
def test_errors_are_one_line_and_a_status(monkeypatch, capsys, error, status, said):
    command(monkeypatch, raising(error))
    assert cli.main(["fake"]) == status
    out, err = capsys.readouterr()
    assert not out
    assert err.startswith(said)
    assert err.count("\n") == 1


def test_a_fault_keeps_its_traceback(monkeypatch, capsys):
    command(monkeypatch, raising(ZeroDivisionError("by zero")))
    cli.main(["fake"])
    path = capsys.readouterr().err.rpartition("traceback in ")[2].strip().rstrip(")")
    assert "Traceback" in Path(path).read_text()
    Path(path).unlink()
    monkeypatch.setenv("RFTT_DEBUG", "1")
    with pytest.raises(ZeroDivisionError):
        cli.main(["fake"])


@pytest.mark.parametrize("args", [["nonsense"], ["serach", "--config", "x"], ["--confg"]])
def test_unknown_command(args, capsys):
    assert cli.main(args) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert "search, curate" in err


@pytest.mark.parametrize(("flags", "status"), [((), 0), (("-P",), 2)])
def test_a_class_in_the_working_directory_is_found(tmp_path, flags, status):
    """The console script lies elsewhere, as here; -P asks for a path without the working directory."""
    script = tmp_path / "bin" / "rftt"
    script.parent.mkdir()
    script.write_text("import sys\nfrom rftt_lightning.app.cli import main\nsys.exit(main())\n")
    (tmp_path / "mysrc.py").write_text(
        "from rftt_lightning.tiny.countdown import Countdown\nclass MySource(Countdown):\n    pass\n"
    )
    options = [f"--config={SFT.with_name('search.yaml')}", "--source.class_path=mysrc.MySource", "--print_config"]
    command = [sys.executable, *flags, str(script), "search", *options]
    env = {**os.environ, "PYTHONPATH": str(SFT.parents[2])}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env)
    assert done.returncode == status, done.stderr
    assert "mysrc.MySource" in (done.stderr if status else done.stdout)


# -- typed functions as commands -------------------------------------------------------------------------------------------

CALLS = []


def work(
    source: ProblemSource,
    sampling: Sampling = Sampling(),
    rollouts: list[int] = [1, 2],  # noqa: B006
    limit: int | None = 5,
    rate: float = 1e-4,
    out: str = "runs/work",
) -> None:
    """Do some work.

    Args:
        source: the problems.
        rate: of something.
    """
    CALLS.append((source, sampling, rollouts, limit, rate, out))


@pytest.fixture
def gsm8k(tmp_path):
    path = tmp_path / "problems.jsonl"
    path.write_text(json.dumps({"question": "1 + 1?", "answer": "#### 2", "idx": 0}) + "\n")
    return ["--source", "rftt_lightning.search.problems.GSM8K", "--source.path", str(path)]


def test_saved_config_repeats_the_run(gsm8k, tmp_path):
    CALLS.clear()
    out = tmp_path / "new" / "out"
    chosen = ["--limit=null", "--rate=3e-5", "--sampling.top_p=0.5", "--rollouts=[4]"]
    options = [*gsm8k, *chosen, "--out", str(out)]
    assert run_command(work, options, "rftt work") == 0
    saved = (out / "config.yaml").read_text()
    assert run_command(work, ["--config", str(out / "config.yaml")], "rftt work") == 0
    assert (out / "config.yaml").read_text() == saved
    first, second = CALLS
    assert first[1:] == second[1:] == (Sampling(top_p=0.5), [4], None, 3e-5, str(out))
    assert first[0].problems() == second[0].problems()


def test_printed_config_is_the_saved_one(gsm8k, tmp_path, capsys):
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        run_command(work, [*gsm8k, "--out", str(out), "--print_config"], "rftt work")
    printed = capsys.readouterr().out
    assert not out.exists()
    run_command(work, [*gsm8k, "--out", str(out)], "rftt work")
    assert yaml.safe_load(printed) == yaml.safe_load((out / "config.yaml").read_text())


def test_later_configs_and_options_win(gsm8k, tmp_path):
    CALLS.clear()
    a, b = tmp_path / "a.yaml", tmp_path / "b.yaml"
    a.write_text("rate: 1.0\nlimit: 1\nrollouts: [1]\n")
    b.write_text("limit: 2\nrollouts: [2]\n")
    out = str(tmp_path)
    run_command(work, ["--config", str(a), "--config", str(b), *gsm8k, "--rollouts", "[3]", "--out", out], "rftt work")
    assert CALLS[0][2:] == ([3], 2, 1.0, out)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nonsense", "1"], "nonsense"),
        (["--rate", "fast"], "rate.*fast"),
        (["--limit", "1.5"], "limit"),
        (["--config", "nowhere.yaml"], "nowhere.yaml"),
        (["--source.nonsense", "1"], "nonsense"),
        (["--source", "rftt_lightning.search.problems.Nonsense"], "Nonsense"),
        (["--sampling.top_p", "7"], "top_p"),
        (["--sampling.boundary", "coin"], "use 'sample' or 'argmax'"),
        (["--out", "/proc/nowhere"], "cannot write to /proc/nowhere"),
    ],
)
def test_mistakes_are_one_line(gsm8k, tmp_path, options, message):
    with pytest.raises(UserError, match=message) as error:
        run_command(work, [*gsm8k, "--out", str(tmp_path / "out"), *options], "rftt work")
    assert "\n" not in str(error.value)


def test_missing_and_malformed_configs(tmp_path):
    with pytest.raises(UserError, match="source"):
        run_command(work, [], "rftt work")
    bad = tmp_path / "bad.yaml"
    for content in ("rate: [", "- 1\n", "rates: 1\n", "rate: {a: 1}\n"):
        bad.write_text(content)
        with pytest.raises(UserError) as error:
            run_command(work, ["--config", str(bad)], "rftt work")
        assert "\n" not in str(error.value)


def test_one_line():
    assert one_line("Parser key 'a':\n  Expected\n\n  this") == "Parser key 'a': Expected; this"


# -- sft -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("cli")
    return {"--model.model": save_base(root / "base"), "--data.folder": write_store(root / "data", trajectories(30))}


def sft(world, out, *more):
    options = [text for pair in {**world, "--out": out, "--trainer.max_epochs": 1}.items() for text in map(str, pair)]
    return ["sft", "fit", "--config", str(SFT), *options, "--trainer.enable_progress_bar=false", *map(str, more)]


def test_sft_writes_everything_below_out_and_its_config_repeats_it(world, tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(sft(world, out)) == 0
    names = {path.name for path in out.iterdir()}
    assert {"config.yaml", "hf", "checkpoints"} <= names
    assert any(name.startswith("events") for name in names)
    first = (out / "hf" / "model.safetensors").read_bytes()
    saved = (out / "config.yaml").read_text()
    assert cli.main(["sft", "fit", "--config", str(out / "config.yaml"), "--ckpt_path=none"]) == 0
    assert (out / "hf" / "model.safetensors").read_bytes() == first
    assert yaml.safe_load((out / "config.yaml").read_text()) == yaml.safe_load(saved)
    assert cli.main(sft(world, tmp_path / "other", "--seed_everything", 1)) == 0
    assert (tmp_path / "other" / "hf" / "model.safetensors").read_bytes() != first


def test_a_checkpoint_never_changes_what_was_asked_in_silence(world, tmp_path, capsys):
    out, constant = tmp_path / "out", ("--model.schedule", "constant")
    cli.main(sft(world, out, *constant))
    ckpt = out / "checkpoints" / "last.ckpt"
    more = ("--ckpt_path", ckpt, *constant, "--trainer.max_epochs", 2)
    capsys.readouterr()
    assert cli.main(sft(world, tmp_path / "b", *more, "--model.lr", 0.5)) == 2
    assert "model.lr=0.003, now it is 0.5" in capsys.readouterr().err
    assert cli.main(sft(world, tmp_path / "c", *more)) == 0


def test_the_saved_config_is_that_of_the_run_whose_results_are_there(world, tmp_path, capsys):
    out = tmp_path / "out"
    constant = ("--data.val_fraction", 0.3, "--model.schedule", "constant")
    assert cli.main(sft(world, out, *constant)) == 0
    ckpt, saved = out / "checkpoints" / "last.ckpt", (out / "config.yaml").read_text()
    again = sft(world, out, "--ckpt_path", ckpt, *constant, "--trainer.max_epochs", 2)
    assert cli.main([*again, "--model.lr", "0.5"]) == 2  # refused, when the checkpoint is read
    for path in (ckpt, "last", "none"):
        assert cli.main(["sft", "validate", *again[2:], "--ckpt_path", str(path), "--data.batch_size", "3"]) == 0
    assert (out / "config.yaml").read_text() == saved
    assert cli.main(again) == 0
    new = yaml.safe_load((out / "config.yaml").read_text())
    assert new["trainer"]["max_epochs"] == 2
    assert new["ckpt_path"] is None  # it may be gone when the run is repeated


class Impatient(Callback):
    def on_train_batch_end(self, *args):
        raise KeyboardInterrupt


def kept(*more):
    """Callbacks of a run that saves each step, and perhaps does not live long."""
    saving = {
        "class_path": "lightning.pytorch.callbacks.ModelCheckpoint",
        "init_args": {"every_n_train_steps": 1, "save_last": True},
    }
    export = {"class_path": "rftt_lightning.training.callbacks.ExportHF"}
    return f"--trainer.callbacks={json.dumps([*more, export, saving])}"


def stopped(steps):
    return {"class_path": "sft_world.Killed", "init_args": {"steps": steps}}


def test_sft_that_is_started_again_goes_on(world, tmp_path, capfd):
    """To the weights of the straight run; "none" begins anew, and what is not the same run is refused."""
    two = ("--trainer.max_epochs", 2)
    assert cli.main(sft(world, tmp_path / "straight", *two, kept())) == 0
    straight = (tmp_path / "straight" / "hf" / "model.safetensors").read_bytes()
    out = tmp_path / "out"
    for steps in (2, 3):  # the second time it begins after the first
        assert cli.main(sft(world, out, *two, kept(stopped(steps)))) == 1
        assert "RuntimeError: killed" in capfd.readouterr().err
    assert cli.main(sft(world, out, *two, kept(), "--model.lr=0.5")) == 2
    assert "model.lr=0.003, now it is 0.5" in capfd.readouterr().err
    assert cli.main(sft(world, out, *two, kept(stopped(2)))) == 0  # which is not done again
    assert (out / "hf" / "model.safetensors").read_bytes() == straight
    shutil.rmtree(out / "hf")  # killed before its export, though all steps are done
    assert cli.main(sft(world, out, *two, kept(stopped(1)))) == 0
    assert (out / "hf" / "model.safetensors").read_bytes() == straight
    assert cli.main(sft(world, out, *two, kept(), "--ckpt_path=none", "--data.batch_size=0")) == 2
    assert list((out / "checkpoints").glob("*.ckpt"))  # a run that is refused leaves what is there
    assert cli.main(sft(world, out, *two, kept(stopped(1)), "--ckpt_path=none")) == 1
    assert not list((out / "checkpoints").glob("*.ckpt"))  # or the next would go on with the run before
    assert cli.main(sft(world, tmp_path / "new", "--ckpt_path=last")) == 2
    assert "there is no last checkpoint in" in capfd.readouterr().err


def test_a_finished_run_is_left_as_it_is(world, tmp_path):
    assert cli.main(sft(world, tmp_path)) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()}
    assert cli.main(sft(world, tmp_path, kept(stopped(1)))) == 0  # not a step is done
    assert {path: path.read_bytes() for path in (tmp_path / "hf").iterdir()} == before


def test_a_damaged_checkpoint_is_not_begun_from(world, tmp_path, capfd):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"torn")
    assert cli.main(sft(world, tmp_path)) == 2
    assert "last.ckpt is no checkpoint, or a damaged one" in capfd.readouterr().err


def test_interrupted_sft(world, tmp_path, capsys):
    handler = signal.getsignal(signal.SIGINT)
    try:
        assert cli.main(sft(world, tmp_path / "out", "--trainer.callbacks=test_cli.Impatient")) == 130
    finally:
        signal.signal(signal.SIGINT, handler)
    assert capsys.readouterr().err.splitlines()[-1].startswith("rftt: interrupted")


class Signalled(Callback):
    """Amid the accumulation of the second optimizer step the process is asked to stop; or at the first batch of validation."""

    def __init__(self, number: int) -> None:
        self.number = number

    def on_train_batch_start(self, trainer, module, batch, number):
        if number == 4:
            os.kill(os.getpid(), self.number)

    def on_validation_batch_start(self, trainer, module, batch, number, *args):
        if trainer.state.fn == "validate" and number == 0:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_sft_that_is_asked_to_stop_saves_and_goes_on(world, tmp_path, capfd, number):
    """To the weights of the straight run, though no checkpoint was due."""
    export = {"class_path": "rftt_lightning.training.callbacks.ExportHF"}
    asked = {"class_path": "test_cli.Signalled", "init_args": {"number": number.value}}
    handlers = [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)]

    def run(out, *callbacks):
        steps = ("--data.batch_size=4", "--trainer.accumulate_grad_batches=3", "--trainer.enable_checkpointing=false")
        return cli.main(sft(world, out, *steps, f"--trainer.callbacks={json.dumps([*callbacks, export])}"))

    out = tmp_path / "out"
    assert run(tmp_path / "straight") == 0
    assert run(out, asked) == 130
    assert capfd.readouterr().err.splitlines()[-1].startswith("rftt: interrupted")
    assert [signal.getsignal(kind) for kind in (signal.SIGTERM, signal.SIGINT)] == handlers
    (saved,) = (out / "checkpoints").iterdir()
    assert torch.load(saved, weights_only=True)["global_step"] == 2 and not (out / "hf").exists()
    assert run(out) == 0
    first, second = (folder / "hf" / "model.safetensors" for folder in (tmp_path / "straight", out))
    assert first.read_bytes() == second.read_bytes()


def test_validation_that_is_asked_to_stop_has_not_succeeded(world, tmp_path, capfd):
    asked = {"class_path": "test_cli.Signalled", "init_args": {"number": signal.SIGTERM.value}}
    some = ("--data.val_fraction=0.5", "--data.batch_size=2", f"--trainer.callbacks={json.dumps([asked])}")
    command = ["sft", "validate", *sft(world, tmp_path / "out", *some)[2:]]
    assert cli.main(command) == 130
    assert capfd.readouterr().err.splitlines()[-1].startswith("rftt: interrupted")


def sharded(data, tensor):
    strategy = "--trainer.strategy"
    sizes = [f"{strategy}.data_parallel_size={data}", f"{strategy}.tensor_parallel_size={tensor}"]
    return [f"{strategy}=lightning.pytorch.strategies.ModelParallelStrategy", *sizes, "--trainer.devices=1"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model.nonsense", "1"], "nonsense"),
        (["--model.lr", "fast"], "fast"),
        (["--model.model", "./nowhere"], "no model at ./nowhere"),
        (["--data.folder", "./nowhere"], "./nowhere is no store of trajectories"),
        (["--data.max_length", "3"], "see max_length"),
        (["--ckpt_path", "./nowhere.ckpt"], "no checkpoint at ./nowhere.ckpt"),
        (["--trainer.accelerator", "nonsense"], "nonsense"),
        (["--trainer.callbacks+=Nonsense"], "Nonsense"),
        (["--out", "/proc/nowhere"], "/proc/nowhere"),
        (["--ckpt_path", str(SFT)], "is no checkpoint, or a damaged one"),
        (["--ckpt_path", "best"], "no checkpoint at best"),
        (["--ckpt_path", str(SFT.parent)], "no checkpoint at"),
        (["--seed_everything", "-1"], "seed_everything is -1"),
        (["--seed_everything", "true"], "seed_everything is True"),
        (["--model.dtype", "foo"], "foo"),
        (["--model.betas", "[0.9, 1.0]"], "0 <= betas < 1"),
        (["--trainer.accelerator", "tpu"], "trainer: "),
        (sharded(8, 1), "data_parallel_size 8 x tensor_parallel_size 1 is not the number of devices, 1; set --"),
        (sharded("auto", 2), "data_parallel_size 1 x tensor_parallel_size 2 is not the number of devices, 1"),
        (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches is 0"),
    ],
)
def test_mistakes_of_sft_are_one_line(world, tmp_path, capsys, options, message):
    assert cli.main(sft(world, tmp_path / "out", *options)) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("rftt: ")]
    assert len(lines) == 1
    assert message in lines[0]
