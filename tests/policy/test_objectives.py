"""Objectives against oracles in plain loops, and against a gradient that is known."""

import pytest
import torch

import oracles
from rftt_lightning.policy import objectives


def ragged(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """Random values [B, T] and a mask of responses of unequal length, float64."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = int(torch.randint(1, 7, (), generator=generator)), int(torch.randint(1, 12, (), generator=generator))
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    begin = torch.randint(0, width, (rows, 1), generator=generator)
    end = begin + torch.randint(0, width + 1, (rows, 1), generator=generator)
    where = torch.arange(width)[None]
    return values, ((where >= begin) & (where < end)).double(), generator


@pytest.mark.parametrize("seed", range(100))
def test_returns_whitening_and_baselines_equal_their_oracles(seed):
    values, mask, generator = ragged(seed)
    gamma = [1.0, 0.9, 0.0][seed % 3]
    expected = torch.tensor(oracles.returns_to_go(values.tolist(), gamma), dtype=torch.float64)
    torch.testing.assert_close(objectives.returns_to_go(values, gamma), expected, rtol=0, atol=1e-9)
    for center in (True, False):
        expected = torch.tensor(oracles.whiten(values.tolist(), mask.tolist(), center), dtype=torch.float64)
        torch.testing.assert_close(objectives.whiten(values, mask, center=center), expected, rtol=0, atol=1e-9)
    groups = torch.randint(0, 3, (len(values),), generator=generator)
    for alone in (True, False):
        expected = torch.tensor(
            oracles.group_baseline(values[:, 0].tolist(), groups.tolist(), alone), dtype=torch.float64
        )
        found = objectives.subtract_group_mean(values[:, 0], groups, leave_one_out=alone)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("seed", range(100))
def test_clipped_loss_equals_its_oracle(seed):
    values, mask, generator = ragged(seed)
    old = values + 0.5 * torch.randn(values.shape, generator=generator, dtype=torch.float64)
    gain = torch.randn(values.shape, generator=generator, dtype=torch.float64)
    weight = mask * torch.rand(values.shape, generator=generator, dtype=torch.float64)
    loss, clipped = objectives.ppo_loss(values, old, gain, weight, 7.0, 0.2, 0.28)
    expected = oracles.ppo(values.tolist(), old.tolist(), gain.tolist(), weight.tolist(), 7.0, 0.2, 0.28)
    assert (float(loss), float(clipped)) == pytest.approx(expected, abs=1e-9)


def test_whitening_over_ranks_is_whitening_of_the_whole():
    values, mask = torch.randn(6, 5, dtype=torch.float64), (torch.rand(6, 5) < 0.7).double()
    whole = objectives.whiten(values, mask)
    seen: list[torch.Tensor] = []

    def halves(index: int) -> torch.Tensor:
        """One rank's share; its sums are completed by those that the other rank would add."""
        mine, other = slice(0, 3) if index == 0 else slice(3, 6), slice(3, 6) if index == 0 else slice(0, 3)
        calls = iter(range(2))

        def reduce(x: torch.Tensor) -> torch.Tensor:
            if next(calls) == 0:
                return x + torch.stack([mask[other].sum(), (values * mask)[other].sum()])
            mean = (values * mask).sum() / mask.sum()
            return x + ((values * mask - mean) * mask)[other].square().sum()

        return objectives.whiten(values[mine], mask[mine], reduce)

    seen = [halves(0), halves(1)]
    torch.testing.assert_close(torch.cat(seen), whole)


def test_kl_estimates_are_unbiased_where_they_say_so():
    logits, reference = torch.tensor([0.3, -0.2, 1.0]).double(), torch.tensor([0.0, 0.5, 0.1]).double()
    p, q = logits.log_softmax(0), reference.log_softmax(0)
    truth = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * objectives.kl_penalty(p, q, kind)).sum(), truth)
    torch.testing.assert_close(objectives.kl_penalty(p, q, "k2"), (p - q) ** 2 / 2)


def test_gradient_on_a_categorical_is_the_policy_gradient():
    """At ratio 1 the loss's gradient over all outcomes, weighted by probability, is minus that of the expected reward."""
    logits = torch.tensor([[0.2, -0.4, 0.9]], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    logp = logits.log_softmax(-1)[0]
    loss, _ = objectives.ppo_loss(logp[None], logp.detach()[None], rewards[None], logp.detach().exp()[None], 1.0)
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (truth,) = torch.autograd.grad(-(logp.exp() * rewards).sum(), logits)
    torch.testing.assert_close(found, truth)


def test_what_has_no_spread_has_no_advantage():
    mask = torch.ones(3, 4)
    assert objectives.whiten(torch.full((3, 4), 2.0), mask).abs().max() < 1e-6
    assert objectives.whiten(torch.randn(3, 4), torch.zeros(3, 4)).abs().max() == 0
    assert objectives.subtract_group_mean(torch.tensor([5.0]), torch.tensor([0]), leave_one_out=True).item() == 0
    assert torch.isfinite(objectives.entropy(torch.tensor([0.0, -torch.inf]))).all()
