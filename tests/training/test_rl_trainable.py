"""Policy and reference where not everything is trained: who shares what, and that rollouts come from the weights of now."""

import json

import pytest
import torch

from rftt_lightning.core.contracts import QUESTION, Message, Request
from rftt_lightning.policy.adapters import TRAINABLE, LoRA
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.policy.vocab import load
from rftt_lightning.training.rl import RLModule, Work, collate
from training.test_rl import BASE, fit, late, rollouts


def module(trainable: str, **more) -> RLModule:
    return RLModule(BASE, trainable=trainable, lora=LoRA(rank=4), lr=0.01, seed=3, **more)


def update(module: RLModule, steps: int = 2) -> None:
    batch = module.prepare(collate(rollouts(module), module.vocabulary), rows=4)
    optimizer = module.configure_optimizers()
    for _ in range(steps):
        loss, _ = module(Work(module.totals(batch), batch))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_the_reference_is_the_model_that_training_began_with_to_the_bit_until_it_is_reset(trainable):
    base, policy = module("all"), module(trainable)
    batch = collate(rollouts(base), base.vocabulary)
    with torch.no_grad():
        beginning, _ = base.log_probs(batch)
        assert torch.equal(policy.log_probs(batch)[0], beginning)
        update_weights(policy)
        assert torch.equal(policy.log_probs(batch, policy.reference)[0], beginning)
        now, _ = policy.log_probs(batch)
        assert not torch.equal(now, beginning)
        policy.reset_reference()
        assert torch.equal(policy.log_probs(batch, policy.reference)[0], now)
        update_weights(policy)
        assert torch.equal(policy.log_probs(batch, policy.reference)[0], now)


def update_weights(policy: RLModule) -> None:
    with torch.enable_grad():
        update(policy)


def test_under_autocast_the_reference_is_not_the_policys_cached_weights():
    policy = module("all")
    batch = collate(rollouts(policy), policy.vocabulary)
    update(policy)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        now, _ = policy.log_probs(batch)
        before, _ = policy.log_probs(batch, policy.reference)
    assert (now - before).abs().max() > 0.01


@pytest.mark.parametrize("trainable", TRAINABLE[1:])
def test_what_is_frozen_is_there_once_and_in_no_checkpoint(trainable):
    policy = module(trainable)
    whole = sum(p.numel() for p in policy.model.parameters())
    for weights in (policy.reference, policy.trained(), policy.weights_saved()):
        assert sum(w.numel() for w in weights.values()) < whole / 8
    assert len(list(policy.parameters())) == len(list(policy.model.parameters()))


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_weights_come_back_to_the_bit(trainable, tmp_path):
    policy, other = module(trainable), module(trainable)
    update(policy)
    assert policy.digest() != other.digest()
    torch.save(policy.weights_saved(), tmp_path / "weights.pt")
    other.load_weights(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert policy.digest() == other.digest()
    assert all(torch.equal(w, other.trained()[name]) for name, w in policy.trained().items())


def test_weights_of_another_kind_are_refused():
    with pytest.raises(Exception, match=r"model\.trainable"):
        module("lora").load_weights(module("functional_rows").weights_saved())


def test_the_digest_sees_every_bit_and_where_it_is():
    policy = module("functional_rows")
    (row,) = policy.trained().values()
    digests = {policy.digest()}
    with torch.no_grad():
        row[-1, -1] = torch.nextafter(row[-1, -1], torch.tensor(9.0))
        digests.add(policy.digest())
        row[[0, 1]] = row[[1, 0]]
        digests.add(policy.digest())
        row[[0, 1]] = row[[1, 0]]
    digests.add(policy.digest())
    assert len(digests) == 3


@pytest.mark.parametrize("trainable", TRAINABLE)
def test_rollouts_after_an_update_are_of_the_new_weights(trainable):
    """Though the prefix is in the cache, and nobody raised the backend's version."""
    policy = module(trainable)
    backend = HFBackend.live(policy.model, policy.tokenizer, policy.table, batch_size=4)
    prompt = backend.chat([Message("user", "3 18 16 target 37")])
    request = Request(prompt, seed=1, max_tokens=24, after=QUESTION, segments=0)
    policy.eval()
    (before,) = backend.generate([request])
    update(policy, steps=4)
    (after,) = backend.generate([request])
    fresh = HFBackend.live(policy.model, policy.tokenizer, policy.table, batch_size=4, cache_gb=0.0)
    (expected,) = fresh.generate([request])
    assert [s.tokens for s in after.segments] == [s.tokens for s in expected.segments]
    found, wanted = (torch.tensor([x for s in c.segments for x in s.logprobs]) for c in (after, expected))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5)
    old = torch.tensor([x for s in before.segments for x in s.logprobs])
    assert len(old) != len(found) or (old - found).abs().max() > 1e-3


def test_recomputed_activations_have_the_same_gradients():
    def gradients(recompute: bool) -> list[torch.Tensor]:
        policy = module("lora", gradient_checkpointing=recompute)
        batch = policy.prepare(collate(rollouts(policy), policy.vocabulary), rows=4)
        policy.train()
        assert policy.model.is_gradient_checkpointing == recompute
        policy(Work(policy.totals(batch), batch))[0].backward()
        return [p.grad for p in policy.trained().values()]

    pairs = list(zip(gradients(True), gradients(False), strict=True))
    assert all(torch.equal(a, b) for a, b in pairs) and any(a.abs().max() > 0 for a, _ in pairs)


def test_an_export_keeps_what_bfloat16_would_round_away():
    """Updates a hundred times smaller than the weights: merged in half precision most of them would be gone."""
    policy = module("lora", dtype="bfloat16")
    base = {name: weight.float() for name, weight in load(BASE, "bfloat16")[0].state_dict().items()}
    expected = {}
    with torch.no_grad():
        for name, layer in policy.model.named_modules():
            if hasattr(layer, "lora_B"):
                down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
                up.normal_(0.0, 1e-3)
                expected[f"{name}.weight"] = (up @ down * layer.scaling["default"]).clone()
    merged = policy.merged().state_dict()
    assert len(expected) > 5
    for name, update in expected.items():
        assert ((merged[name] - base[name]) - update).norm() < 1e-3 * update.norm()


def test_a_run_that_trains_rows_alone_exports_a_model_that_differs_in_them_alone(tmp_path):
    options = ["--model.trainable=functional_rows", "--model.weight_decay=0.1", "--trainer.max_steps=2"]
    assert fit(tmp_path, *late(0.0), *options) == 0
    start = RLModule(BASE)
    before, after = start.model.state_dict(), load(str(tmp_path / "hf"), "float32")[0].state_dict()
    assert before.keys() == after.keys()
    rows = sorted([*start.vocabulary.opens, *start.vocabulary.closes])
    changed = {name: (w != after[name]) for name, w in before.items() if not torch.equal(w, after[name])}
    assert set(changed) == {"model.embed_tokens.weight", "lm_head.weight"}
    assert all(set(c.any(1).nonzero().flatten().tolist()) <= set(rows) for c in changed.values())
    state = torch.load(next((tmp_path / "checkpoints").glob("step-*2.pt")), weights_only=True)
    assert {tuple(w.shape) for w in state["model"].values()} == {(len(rows), 128)}


def test_the_reference_is_reset_when_it_is_said(tmp_path):
    """Nothing lies between policy and reference at the step of a reset."""
    assert fit(tmp_path, *late(0.0), "--trainer.max_steps=5", "--model.reference_reset=2", "--model.lr=0.01") == 0
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [abs(line["kl"]) < 1e-6 for line in lines] == [True, False, True, False, True]


def test_a_reference_that_is_no_more_reset_stays(tmp_path):
    """Also when the run goes on a second time."""
    options = [*late(0.0), "--model.lr=0.01", "--trainer.keep=9"]
    assert fit(tmp_path, *options, "--trainer.max_steps=3", "--model.reference_reset=2") == 0
    options += ["--trainer.max_steps=5", "--trainer.accept_changes=true"]
    assert fit(tmp_path, *options) == 0
    straight = (tmp_path / "metrics.jsonl").read_bytes()
    assert fit(tmp_path, *options, f"--ckpt_path={tmp_path / 'checkpoints/step-000004.pt'}") == 0
    assert (tmp_path / "metrics.jsonl").read_bytes() == straight
