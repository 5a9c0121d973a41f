import json
import math
from types import SimpleNamespace

import pytest
import torch
from lightning import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import FSDPStrategy, SingleDeviceStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rftt_lightning.core.contracts import Problem, UserError
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.policy.vocab import load
from rftt_lightning.training.callbacks import ExportHF, Samples
from rftt_lightning.training.data import TreeDataModule, share_of
from rftt_lightning.training.sft import CHUNK, SFTModule, lr_factor, nll_and_right, scheduled_adamw
from sft_world import Killed, save_base, trajectories, write_store


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("sft")
    return SimpleNamespace(base=save_base(root / "base"), data=write_store(root / "data", trajectories(40)))


def fit(world, out, data=None, model=None, callbacks=(), ckpt_path=None, **trainer):
    seed_everything(0)
    settings = {"max_epochs": 2, "num_sanity_val_steps": 0, "gradient_clip_val": 1.0, **trainer}
    quiet = {"enable_progress_bar": False, "enable_model_summary": False}
    module = SFTModule(world.base, **{"lr": 1e-2, "warmup_steps": 3, "schedule": "cosine", **(model or {})})
    runner = Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=out,
        logger=TensorBoardLogger(out, name="", version=""),
        callbacks=list(callbacks) or None,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        log_every_n_steps=1,
        **quiet,
        **settings,
    )
    runner.fit(module, TreeDataModule(world.data, **{"batch_size": 8, **(data or {})}), ckpt_path=ckpt_path)
    return module, runner


def weights(module):
    return {name: p.detach().clone() for name, p in module.model.named_parameters()}


def scalars(out, name):
    events = EventAccumulator(str(out)).Reload()
    return [event.value for event in events.Scalars(name)]


# -- loss ----------------------------------------------------------------------------------------------------------------


def test_loss_is_the_mean_over_all_response_tokens_of_the_step(world, tmp_path):
    module = SFTModule(world.base)
    module.configure_model()
    data = TreeDataModule(world.data, batch_size=8)
    data.trainer = SimpleNamespace(lightning_module=module, global_rank=0, world_size=1, accumulate_grad_batches=1)
    data.setup("fit")
    batch = next(iter(data.train_dataloader()))
    total, count = 0.0, 0
    for row, loss in zip(batch.tokens_BT, batch.loss_BT, strict=True):  # the slow way: token by token
        with torch.no_grad():
            spread = module.model(row[None]).logits[0].log_softmax(-1)
        for t in range(1, len(row)):
            if loss[t]:
                total, count = total - spread[t - 1, row[t]].item(), count + 1
    outcome = module.compute(batch)
    assert outcome.tokens.item() == batch.denominator == count
    assert outcome.nll.item() == pytest.approx(total, rel=1e-5)
    assert 0 < outcome.functional.item() < count


def test_chunks_change_nothing():
    torch.manual_seed(0)
    logits, targets = torch.randn(2500, 7), torch.randint(7, (2500,))
    nll, right = nll_and_right(logits, targets)
    torch.testing.assert_close(nll, torch.nn.functional.cross_entropy(logits, targets, reduction="none"))
    assert torch.equal(right, logits.argmax(-1) == targets)


def test_chunks_keep_no_log_probabilities_for_the_backward_pass():
    torch.manual_seed(0)
    logits, targets = torch.randn(2500, 7, dtype=torch.bfloat16, requires_grad=True), torch.randint(7, (2500,))
    kept = []

    def pack(tensor):
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        nll = nll_and_right(logits, targets)[0].sum()
    assert sum(t.numel() for t in kept if t.dtype == torch.float32 and t.ndim == 2) <= CHUNK * 7
    whole = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
    torch.testing.assert_close(nll, whole)
    torch.testing.assert_close(*(torch.autograd.grad(loss, logits)[0] for loss in (nll, whole)), rtol=0, atol=0)


@pytest.mark.parametrize("data", [{"batch_size": 2}, {"batch_size": 2, "packing": True}])
def test_accumulation_and_packing_give_the_same_training(world, tmp_path, data):
    one, _ = fit(world, tmp_path / "one", data={"val_fraction": 0.0})
    other, _ = fit(world, tmp_path / "other", data={**data, "val_fraction": 0.0}, accumulate_grad_batches=4)
    for name, weight in weights(one).items():
        torch.testing.assert_close(weights(other)[name], weight, rtol=1e-3, atol=2e-4, msg=name)
    assert scalars(tmp_path / "one", "train/loss") == pytest.approx(scalars(tmp_path / "other", "train/loss"), rel=1e-3)


def test_it_learns_and_says_so(world, tmp_path):
    held = sum(share_of(t.problem.id) < 0.2 for t in trajectories(40))
    assert held
    samples = Samples(count=3, shown=2, max_tokens=30, max_segment_tokens=10)
    _, runner = fit(world, tmp_path, data={"val_fraction": 0.2}, callbacks=[samples], max_epochs=12)
    losses = scalars(tmp_path, "train/loss")
    assert len(losses) == runner.global_step == 12 * math.ceil((40 - held) / 8)
    assert losses[-1] < 0.7 * losses[0]
    names = [
        f"{part}/{name}" for part in ("train", "val") for name in ("loss", "token_accuracy", "functional_accuracy")
    ]
    for name in (*names, "train/grad_norm", "train/lr"):
        assert all(map(math.isfinite, scalars(tmp_path, name))), name
    accuracy = scalars(tmp_path, "val/functional_accuracy")
    assert accuracy[-1] > accuracy[0] + 0.1
    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    assert "samples/0/text_summary" in events.Tags()["tensors"]
    assert {"functional_tokens/data", "functional_tokens/samples"} <= set(events.Tags()["histograms"])
    uses = sum(len(t.steps) for t in trajectories(40) if share_of(t.problem.id) >= 0.2) / (40 - held)
    shares = [scalars(tmp_path, f"functional_tokens_data/{tag}")[0] for tag in TokenTable.from_yaml().names]
    assert sum(shares) == pytest.approx(uses, rel=1e-5)


def test_weight_decay_is_of_matrices_alone_and_what_is_frozen_is_left_out(world):
    module = SFTModule(world.base, weight_decay=0.1)
    module.configure_model()
    module.trainer = SimpleNamespace(estimated_stepping_batches=10)
    frozen, *trained = module.parameters()
    frozen.requires_grad_(False)
    decayed, plain = scheduled_adamw(module, (0.9, 0.95))["optimizer"].param_groups
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert {p.ndim for p in decayed["params"]} == {2} and {p.ndim for p in plain["params"]} == {1}
    assert {id(p) for group in (decayed, plain) for p in group["params"]} == {id(p) for p in trained}


def test_non_finite_loss_stops_before_the_step(world, tmp_path):
    with pytest.raises(FloatingPointError, match=r"loss is nan|gradient norm is"):
        fit(world, tmp_path, model={"lr": 1e30, "warmup_steps": 0}, gradient_clip_val=None)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": FSDPStrategy()}, r"fsdp2\.yaml"),
        ({"accumulate_grad_batches": 2, "limit_train_batches": 0.5}, "limit_train_batches 0.5 may cut"),
        ({"accumulate_grad_batches": 2, "limit_train_batches": 1}, "limit_train_batches 1 may cut"),
        ({"precision": "16-mixed"}, "precision is 16-mixed; use bf16-mixed"),
        ({"precision": "16-true"}, "precision is 16-true; use bf16-mixed"),
        ({"accumulate_grad_batches": 2, "precision": "bf16-mixed"}, None),
        ({"limit_train_batches": 1}, None),
    ],
)
def test_trainers_that_would_train_wrongly_are_refused(settings, message):
    usual = {"accumulate_grad_batches": 1, "limit_train_batches": 1.0, "precision": "32-true"}
    module = SFTModule("unused")
    module.trainer = SimpleNamespace(**{"strategy": SingleDeviceStrategy(), **usual, **settings})
    if message is None:
        module.setup("fit")
    else:
        with pytest.raises(UserError, match=message):
            module.setup("fit")


# -- schedule ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("schedule", "middle"), [("constant", 1.0), ("linear", 0.55), ("cosine", 0.55)])
def test_learning_rate(schedule, middle):
    settings = SimpleNamespace(warmup_steps=10, schedule=schedule, final_lr=0.1)
    factors = [lr_factor(step, 110, settings) for step in range(111)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[9] == factors[10] == pytest.approx(1.0)
    assert factors[60] == pytest.approx(middle)
    assert factors[110] == pytest.approx(1.0 if schedule == "constant" else 0.1)


# -- resume --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings", [{}, {"data": {"batch_size": 2, "packing": True, "max_tokens": 60}, "accumulate_grad_batches": 3}]
)
def test_resumed_from_any_step_is_bitwise_the_straight_run(world, tmp_path, settings):
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=1, save_top_k=-1)
    straight, runner = fit(world, tmp_path / "straight", callbacks=[keep], max_epochs=3, **settings)
    losses = scalars(tmp_path / "straight", "train/loss")
    for step in range(1, runner.global_step):
        out = tmp_path / f"resumed{step}"
        path = tmp_path / "kept" / f"step={step}.ckpt"
        resumed, again = fit(world, out, max_epochs=3, ckpt_path=path, **settings)
        assert again.global_step == runner.global_step, step
        assert scalars(out, "train/loss") == losses[step:], step
        for name, weight in weights(straight).items():
            assert torch.equal(weights(resumed)[name], weight), (step, name)


def test_resuming_with_other_settings_or_data_is_refused(world, tmp_path):
    keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=2, save_top_k=-1)
    fit(world, tmp_path, callbacks=[keep], max_epochs=1)
    path = tmp_path / "step=2.ckpt"
    with pytest.raises(UserError, match=r"written with model.lr=0.01, now it is 0.5"):
        fit(world, tmp_path, model={"lr": 0.5}, ckpt_path=path)
    with pytest.raises(UserError, match=r"data.batch_size=8, now it is 5.*same data"):
        fit(world, tmp_path, data={"batch_size": 5}, max_epochs=1, ckpt_path=path)
    with pytest.raises(UserError, match=r"trainer.max_epochs=1, now it is 2"):  # the schedule would jump
        fit(world, tmp_path, max_epochs=2, ckpt_path=path)
    with pytest.raises(UserError, match=r"trainer.gradient_clip_val=1.0, now it is 0.5"):
        fit(world, tmp_path, max_epochs=1, gradient_clip_val=0.5, ckpt_path=path)
    constant = {"schedule": "constant"}
    fit(world, tmp_path / "constant", model=constant, callbacks=[keep], max_epochs=1)
    _, runner = fit(world, tmp_path, model=constant, max_epochs=2, ckpt_path=path.with_stem("step=2-v1"))
    assert runner.current_epoch == 2


@pytest.mark.parametrize("kills", [(3, 5), (2, 3), (2, 4), (4, 6), (1, 2, 3, 4, 5, 6, 7)])
def test_many_kills_add_no_epoch(world, tmp_path, kills):
    """Checkpoints at the ends of epochs, too, after which the Trainer alone miscounts."""
    every = {"data": {"batch_size": 20}, "max_epochs": 4}  # two batches an epoch
    straight, runner = fit(world, tmp_path / "straight", **every)
    assert runner.global_step == 8
    path = None
    for kill in kills:
        keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=1, save_top_k=-1)
        with pytest.raises(RuntimeError, match="killed"):
            fit(world, tmp_path, callbacks=[Killed(kill), keep], ckpt_path=path, **every)
        path = max((tmp_path / "kept").glob("*.ckpt"), key=lambda p: int(p.stem.partition("=")[2]), default=None)
    resumed, again = fit(world, tmp_path / "resumed", ckpt_path=path, **every)
    assert again.global_step == 8
    for name, weight in weights(straight).items():
        assert torch.equal(weights(resumed)[name], weight), name


# -- export --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_export_reloads(world, tmp_path, dtype):
    module, _ = fit(world, tmp_path, callbacks=[ExportHF(dtype=dtype)], max_epochs=1)
    model, tokenizer = load(str(tmp_path / "hf"))
    wanted = torch.float32 if dtype is None else torch.bfloat16
    assert model.dtype == wanted  # equal values may be of another
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["dtype"] == str(wanted).removeprefix("torch.")
    for name, weight in weights(module).items():
        assert torch.equal(model.get_parameter(name), weight.to(wanted)), name
    for tag in module.table.tags:
        assert tokenizer(tag, add_special_tokens=False)["input_ids"] == [module.tokenizer.convert_tokens_to_ids(tag)]
    assert tokenizer.chat_template == module.tokenizer.chat_template


def test_an_export_reads_the_live_weights(world, tmp_path):
    """A strategy may give them with their shards on the CPU, where NCCL cannot gather them; this trainer has no strategy."""
    module = SFTModule(world.base)
    module.configure_model()
    ExportHF().on_train_end(SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path), module)
    exported, _ = load(str(tmp_path / "hf"))
    assert all(torch.equal(exported.get_parameter(name), weight) for name, weight in weights(module).items())


def test_an_export_takes_the_place_of_an_earlier_one_when_it_is_whole(world, tmp_path, monkeypatch):
    module = SFTModule(world.base)
    module.configure_model()
    trainer, folder = SimpleNamespace(is_global_zero=True, default_root_dir=tmp_path), tmp_path / "hf"
    ExportHF().on_train_end(trainer, module)
    (folder / "notes.md").write_text("mine")
    (folder / "model-00001-of-00002.safetensors").write_text("of a larger model")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with monkeypatch.context() as patch:  # killed when the weights are written, the tokenizer is not
        patch.setattr(type(module.tokenizer), "save_pretrained", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            ExportHF(dtype="bfloat16").on_train_end(trainer, module)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    ExportHF(dtype="bfloat16").on_train_end(trainer, module)
    assert load(str(folder))[0].dtype == torch.bfloat16
    assert {path.name for path in folder.iterdir()} == before.keys() - {"model-00001-of-00002.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"schedule": "cosin"}, "use one of constant, linear, cosine"),
        ({"lr": -1.0}, "lr > 0"),
        ({"tokens": "nowhere.yaml"}, "cannot read the functional-token table"),
    ],
)
def test_mistakes(settings, message):
    with pytest.raises(UserError, match=message):
        SFTModule("base", **settings)
    with pytest.raises(UserError, match="float32, bfloat16"):
        ExportHF(dtype="int9")


def test_an_export_to_where_a_file_lies_is_refused_before_training(world, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file; give a folder"):
        fit(world, tmp_path, callbacks=[ExportHF(str(tmp_path / "file"))])


def test_answers_stay_with_their_questions_where_one_leaves_no_room(world):
    module = SFTModule(world.base)
    module.configure_model()
    long, short = Problem("long", "one " * 200), Problem("short", "one two")
    samples = Samples(max_tokens=20, max_segment_tokens=8)
    ((problem, path),) = samples.answer(module, [long, short])
    assert problem == short
    assert path == samples.answer(module, [short])[0][1] != []


def test_samples_keep_no_keys_and_values(world, monkeypatch):
    module, live, made = SFTModule(world.base), HFBackend.live, []
    module.configure_model()
    monkeypatch.setattr(HFBackend, "live", lambda *args, **options: made.append(live(*args, **options)) or made[0])
    Samples(max_tokens=20, max_segment_tokens=8).answer(module, [Problem("short", "one two")])
    assert len(made) == 1 and made[0]._prefixes.capacity == 0
