"""Objectives against oracles in plain loops, against gradients that are known, and on trees worked out by hand."""

import itertools
import math
import random

import pytest
import torch

import oracles
from rftt_lightning.policy import objectives


def equal(found: torch.Tensor, expected: list) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-9)


def ragged(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Generator]:
    """Random values [B, T] and a mask of responses of unequal length, float64."""
    generator = torch.Generator().manual_seed(seed)
    rows, width = int(torch.randint(1, 7, (), generator=generator)), int(torch.randint(1, 12, (), generator=generator))
    values = torch.randn(rows, width, generator=generator, dtype=torch.float64)
    begin = torch.randint(0, width, (rows, 1), generator=generator)
    end = begin + torch.randint(0, width + 1, (rows, 1), generator=generator)
    where = torch.arange(width)[None]
    return values, ((where >= begin) & (where < end)).double(), generator


@pytest.mark.parametrize("seed", range(200))
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


@pytest.mark.parametrize("seed", range(200))
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


@pytest.mark.parametrize("seed", range(200))
def test_losses_equal_their_oracles_however_they_are_aggregated(seed):
    """The surrogate and the KL of a batch, once over all of it and once as the sum of the losses of two halves."""
    values, mask, generator = ragged(seed)
    old, behaviour, gain = (
        values + size * torch.randn(values.shape, generator=generator, dtype=torch.float64) for size in (0.5, 0.5, 1.0)
    )
    weight = mask * (torch.rand(values.shape, generator=generator, dtype=torch.float64) - 0.2).clamp(min=0)
    if not weight.any():
        weight[0, 0] = 1.0
    corrections = ("none", 2.0), ("truncated", 1.5), ("masked", 1.3)
    (correction, cap), kind = corrections[seed % 3], ("k1", "k2", "k3")[seed // 3 % 3]
    trust = objectives.importance(old, behaviour, correction, cap)
    pairs = zip(old.flatten().tolist(), behaviour.flatten().tolist(), strict=True)
    equal(trust.flatten(), [oracles.importance(*pair, correction, cap) for pair in pairs])
    gaps = [abs(x - y) for x, y, m in zip(*(z.flatten().tolist() for z in (old, behaviour, mask)), strict=True) if m]
    equal(objectives.sampler_gap(old, behaviour, mask), sum(gaps) / max(len(gaps), 1))
    both = objectives.sampler_gap(
        old, behaviour, mask, lambda x: 2 * x + torch.tensor([1.0, 3.0])
    )  # another rank's share
    equal(both, (2 * sum(gaps) + 1) / (2 * len(gaps) + 3))
    each = [  # loss of each token alone
        [
            oracles.ppo([[x]], [[y]], [[a]], [[1.0]], 1.0, 0.2, 0.28)[0] + 0.1 * oracles.kl(x, y, kind)
            for x, y, a in zip(*rows, strict=True)
        ]
        for rows in zip(values.tolist(), old.tolist(), gain.tolist(), strict=True)
    ]
    for how, length in (("token", 1), ("sequence", 1), ("constant", 7)):
        _, divisor = objectives.aggregate(weight, how, length)
        found = torch.zeros((), dtype=torch.float64)
        for rows in torch.arange(len(values)).tensor_split(2):
            part, _ = objectives.aggregate(weight[rows], how, length)
            loss, _ = objectives.ppo_loss(values[rows], old[rows], gain[rows], part * trust[rows], divisor, 0.2, 0.28)
            found += loss + 0.1 * objectives.kl_loss(values[rows], old[rows], part * trust[rows], divisor, kind)
        trusted = [[x * w for x, w in zip(*rows, strict=True)] for rows in zip(each, trust.tolist(), strict=True)]
        equal(found, oracles.aggregate(trusted, weight.tolist(), how, length))
    expected = oracles.kl_loss(values.tolist(), old.tolist(), weight.tolist(), 3.0, kind)
    equal(objectives.kl_loss(values, old, weight, 3.0, kind), expected)


def planted(seed: int) -> tuple[list[list[int]], list[int], torch.Tensor, torch.Tensor]:
    """Random trees: the path of nodes of each rollout, its group, the node of each position [B, T], and worths [B]."""
    chance = random.Random(seed)
    groups, paths, below, lengths = [], [], {}, {}
    for group in range(chance.randint(1, 3)):
        for _ in range(chance.randint(1, 6)):
            path, place = [], ("root", group)
            for _ in range(chance.randint(1, 5)):
                kids = below.setdefault(place, [])
                if not kids or chance.random() < 0.4:
                    kids.append(len(lengths))
                    lengths[kids[-1]] = chance.randint(1, 3)
                place = chance.choice(kids)
                path.append(place)
            groups.append(group)
            paths.append(path)
    order = chance.sample(range(len(paths)), len(paths))
    paths, groups = [paths[i] for i in order], [groups[i] for i in order]
    rows = [[-1] * chance.randint(0, 3) + [k for k in path for _ in range(lengths[k])] for path in paths]
    width = max(map(len, rows)) + chance.randint(0, 2)
    node_BT = torch.tensor([row + [-1] * (width - len(row)) for row in rows])
    worth_B = torch.tensor([chance.choice([0.0, 1.0, chance.gauss(0, 1)]) for _ in rows], dtype=torch.float64)
    return paths, groups, node_BT, worth_B


def on_tokens(node_BT: torch.Tensor, paths: list[list[int]], values: list[list[float]]) -> list[list[float]]:
    known = [dict(zip(*both, strict=True)) for both in zip(paths, values, strict=True)]
    return [[known[i].get(k, 0.0) for k in row] for i, row in enumerate(node_BT.tolist())]


@pytest.mark.parametrize("seed", range(200))
def test_advantages_in_groups_and_trees_equal_their_oracles(seed):
    paths, groups, node_BT, worth_B = planted(seed)
    group_B, values = torch.tensor(groups), worth_B.tolist()
    equal(objectives.normalise_groups(worth_B, group_B), oracles.grpo(values, groups))
    equal(objectives.treepo(worth_B, node_BT, group_B), oracles.treepo(values, paths, groups))
    for name in ("treerl", "siblings"):
        found = getattr(objectives, name)(worth_B, node_BT, group_B)
        equal(found, on_tokens(node_BT, paths, getattr(oracles, name)(values, paths, groups)))
    rewards = torch.randn(node_BT.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for gamma in (0.9, 0.0):
        found = objectives.returns_to_go(rewards, gamma, objectives.segment_ends(node_BT))
        equal(found, oracles.returns_by_segment(rewards.tolist(), node_BT.tolist(), gamma))


def by_loops(name, rewards, penalty, node_BT, paths, groups, gamma, per):  # type: ignore[no-untyped-def]
    """Advantages of every token by their name, from the oracles; rows of ``paths`` that are empty are no rollouts."""
    live = [i for i, path in enumerate(paths) if path]
    mask, rewards = [[float(k >= 0) for k in row] for row in node_BT.tolist()], [list(row) for row in rewards]
    some = lambda column: [column[i] for i in live]  # noqa: E731
    if name == "reinforce++-baseline":
        totals = [sum(row) for row in some(rewards)]
        for i, total, less in zip(live, totals, oracles.group_baseline(totals, some(groups), False), strict=True):
            rewards[i][max(t for t, m in enumerate(mask[i]) if m)] += less - total
    paid = [[r - k * m for r, k, m in zip(*rows, strict=True)] for rows in zip(rewards, penalty, mask, strict=True)]
    returns = (
        oracles.returns_to_go(paid, gamma)
        if per == "token"
        else oracles.returns_by_segment(paid, node_BT.tolist(), gamma)
    )
    if name == "return":
        return [[g * m for g, m in zip(*rows, strict=True)] for rows in zip(returns, mask, strict=True)]
    if name.startswith("reinforce++"):
        return oracles.whiten(returns, mask, center=name == "reinforce++")
    values = [returns[i][mask[i].index(1.0)] for i in live]
    if name in ("treerl", "siblings"):
        found = dict(zip(live, getattr(oracles, name)(values, some(paths), some(groups)), strict=True))
        return on_tokens(node_BT, paths, [found.get(i, []) for i in range(len(paths))])
    of_rollout = {
        "grpo": lambda: oracles.grpo(values, some(groups)),
        "dr.grpo": lambda: oracles.group_baseline(values, some(groups), leave_one_out=False),
        "rloo": lambda: oracles.group_baseline(values, some(groups), leave_one_out=True),
        "treepo": lambda: oracles.treepo(values, some(paths), some(groups)),
    }[name]()
    found = dict(zip(live, of_rollout, strict=True))
    out = [[found.get(i, 0.0) * m for m in row] for i, row in enumerate(mask)]
    return oracles.whiten(out, mask, center=True) if name == "treepo" else out


@pytest.mark.parametrize("seed", range(200))
def test_advantages_by_name_equal_their_oracles(seed):
    """With steps paid on the way, a KL, discounts; in some batches a row is masked, and what is outside is anything."""
    paths, groups, node_BT, worth_B = planted(seed)
    chance = random.Random(seed)
    if seed % 3 == 0:
        gone = chance.randrange(len(paths))
        paths[gone], node_BT[gone] = [], -1
    mask_BT, generator = (node_BT >= 0).double(), torch.Generator().manual_seed(seed)
    ends_BT = objectives.segment_ends(node_BT)
    rewards_BT = ends_BT * torch.randn(node_BT.shape, generator=generator, dtype=torch.float64) * (seed % 4 > 0)
    if any(paths):
        rewards_BT += (mask_BT.cumsum(1) == mask_BT.sum(1, keepdim=True)) * mask_BT * worth_B[:, None]
    penalty_BT = 0.1 * torch.randn(node_BT.shape, generator=generator, dtype=torch.float64)
    gamma, per = [(1.0, "token"), (0.9, "token"), (0.9, "segment"), (0.0, "segment")][seed % 4]
    columns = rewards_BT, penalty_BT, mask_BT, node_BT, torch.tensor(groups)
    for name in objectives.ADVANTAGES:
        found = objectives.advantages(name, *columns, gamma, per)
        equal(found, by_loops(name, rewards_BT.tolist(), penalty_BT.tolist(), node_BT, paths, groups, gamma, per))


# A tree by hand. Node 0 has the leaves 1 (worth 1) and 2 (worth 0), node 3 is a leaf (worth 0), and so is node 4 (worth 1) below
# an only child's chain 5, all of one problem; another problem has one rollout, through 6.
GOLDEN = torch.tensor([[0, 0, 1, -1], [0, 0, 2, 2], [3, -1, -1, -1], [-1, 5, 4, -1], [6, 6, -1, -1]])
GROUPS, WORTH = torch.tensor([0, 0, 0, 0, 1]), torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0], dtype=torch.float64)


def test_treerl_on_a_tree_by_hand():
    """V(root) = 1/2, V(0) = 1/2 of two rollouts, V(1) = 1, V(2) = 0, V(3) = 0, V(5) = V(4) = 1."""
    expected = [  # (V - V(root)) + (V - V(parent)), by the root of the number of rollouts
        [0.0, 0.0, 0.5 + 0.5, 0.0],
        [0.0, 0.0, -0.5 - 0.5, -0.5 - 0.5],
        [-0.5 - 0.5, 0.0, 0.0, 0.0],
        [0.0, 0.5 + 0.5, 0.5 + 0.0, 0.0],
        [0.0, 0.0, 0.0, 0.0],
    ]
    equal(objectives.treerl(WORTH, GOLDEN, GROUPS), expected)
    worth = WORTH + torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])  # now V(root) = 3/4, V(0) = 1
    assert objectives.treerl(worth, GOLDEN, GROUPS)[0, 0].item() == pytest.approx(2 * 0.25 / math.sqrt(2))


def test_siblings_on_a_tree_by_hand():
    """Below the root 1/2, 0 and 1: mean 1/2, deviation the root of 1/6; below 0 1 and 0; 4 and 6 have no sibling."""
    third = 0.5 / (math.sqrt(1 / 6) + 1e-6)
    one = 0.5 / (0.5 + 1e-6)
    expected = [[0, 0, one, 0], [0, 0, -one, -one], [-third, 0, 0, 0], [0, third, 0, 0], [0.0] * 4]
    equal(objectives.siblings(WORTH, GOLDEN, GROUPS), expected)


def test_treepo_on_a_tree_by_hand():
    """The first two rollouts are compared with all four (mean 1/2) and with each other (1/2), the others with all four."""
    equal(objectives.treepo(WORTH, GOLDEN, GROUPS), [0.5, -0.5, -0.5, 0.5, 0.0])
    worth = WORTH + torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])  # all: mean 3/4; the first two: mean 1
    equal(objectives.treepo(worth, GOLDEN, GROUPS), [2 - 0.875, -0.875, -0.75, 0.25, 0.0])


def test_a_node_that_no_rollout_of_the_batch_passes_changes_nothing():
    """Numbers with gaps, as when rollouts were left out."""
    gaps = torch.where(GOLDEN >= 0, 3 * GOLDEN + 2, -1)
    for name in ("treerl", "siblings", "treepo"):
        option = getattr(objectives, name)
        equal(option(WORTH, gaps, GROUPS), option(WORTH, GOLDEN, GROUPS).tolist())


# -- the gradient of a KL, by adding up all outcomes -----------------------------------------------------------------------

POLICY, REFERENCE = [0.3, -0.2, 1.0], [0.0, 0.5, 0.1]


def kl_gradients(kind: str) -> dict[str, torch.Tensor]:
    """Over a categorical of three: true gradients, and the expected ones of an estimate as a loss and as a penalty."""
    logits = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    p, q = logits.log_softmax(0), torch.tensor(REFERENCE, dtype=torch.float64).log_softmax(0)
    of = lambda loss: torch.autograd.grad(loss, logits, retain_graph=True)[0]  # noqa: E731
    chance = p.detach().exp()[None]
    penalty = -objectives.kl_penalty(p.detach(), q, kind)
    return {
        "reverse": of((p.exp() * (p - q)).sum()),
        "forward": of((q.exp() * (q - p)).sum()),
        "loss": of(objectives.kl_loss(p[None], q[None], chance, 1.0, kind)),
        "reward": of(objectives.ppo_loss(p[None], p.detach()[None], penalty[None], chance, 1.0)[0]),
    }


def test_gradients_of_the_kl_estimates_are_those_of_the_table():
    close = torch.testing.assert_close
    k1, k2, k3 = map(kl_gradients, ("k1", "k2", "k3"))
    close(k1["loss"], torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-12)
    close(k1["reward"], k1["reverse"])
    close(k2["loss"], k2["reverse"])
    close(k3["loss"], k3["forward"])
    close(k3["reward"], k3["reverse"] - k3["forward"])
    assert k1["reverse"].abs().min() > 0.01 and (k1["reverse"] - k1["forward"]).abs().min() > 1e-3
    for true in ("reverse", "forward"):
        assert (k2["reward"] - k2[true]).abs().max() > 0.01


def test_kl_estimates_have_the_mean_that_they_say():
    p, q = (torch.tensor(x, dtype=torch.float64).log_softmax(0) for x in (POLICY, REFERENCE))
    truth = (p.exp() * (p - q)).sum()
    for kind in ("k1", "k3"):
        torch.testing.assert_close((p.exp() * objectives.kl_penalty(p, q, kind)).sum(), truth)
    torch.testing.assert_close(objectives.kl_penalty(p, q, "k2"), (p - q) ** 2 / 2)


def test_of_a_sequence_k1_in_the_reward_has_the_gradient_and_k2_in_the_loss_a_part_of_it():
    """Sequences of two tokens, the second of which depends on the first, nine in all."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    first, second = draw(3).requires_grad_(), draw(3, 3).requires_grad_()
    other = draw(3).log_softmax(0), draw(3, 3).log_softmax(1)
    mine = first.log_softmax(0), second.log_softmax(1)
    pairs = list(itertools.product(range(3), repeat=2))
    p_BT, q_BT = (torch.stack([torch.stack([one[i], two[i, j]]) for i, j in pairs]) for one, two in (mine, other))
    chance_B1 = p_BT.sum(1, keepdim=True).exp()
    truth = torch.autograd.grad((chance_B1[:, 0] * (p_BT - q_BT).sum(1)).sum(), (first, second), retain_graph=True)
    weight_BT = chance_B1.detach().expand(-1, 2)

    penalty_BT = objectives.returns_to_go(-objectives.kl_penalty(p_BT.detach(), q_BT, "k1"))
    loss, _ = objectives.ppo_loss(p_BT, p_BT.detach(), penalty_BT, weight_BT, 1.0)
    for found, true in zip(torch.autograd.grad(loss, (first, second), retain_graph=True), truth, strict=True):
        torch.testing.assert_close(found, true)

    loss = objectives.kl_loss(p_BT, q_BT, weight_BT, 1.0, "k2")
    found_first, found_second = torch.autograd.grad(loss, (first, second))
    torch.testing.assert_close(found_second, truth[1])
    assert (found_first - truth[0]).abs().max() > 0.01


def test_gradient_on_a_categorical_is_the_policy_gradient():
    """At ratio 1 the loss's gradient over all outcomes, weighted by probability, is minus that of the expected reward."""
    logits = torch.tensor([[0.2, -0.4, 0.9]], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    logp = logits.log_softmax(-1)[0]
    loss, _ = objectives.ppo_loss(logp[None], logp.detach()[None], rewards[None], logp.detach().exp()[None], 1.0)
    (found,) = torch.autograd.grad(loss, logits, retain_graph=True)
    (truth,) = torch.autograd.grad(-(logp.exp() * rewards).sum(), logits)
    torch.testing.assert_close(found, truth)


@pytest.mark.parametrize("paid", [0.1, 0.3, 0.7, 1.0, 1.1, 3.3, 7.3])
@pytest.mark.parametrize("rows", [2, 3, 12, 16, 32])
def test_what_has_no_spread_has_no_advantage(rows, paid):
    """In float32, where the mean of equal numbers is another number, which a deviation as small would blow up."""
    group_B, node_BT = torch.tensor([0] * rows + [1] * rows), torch.arange(2 * rows)[:, None].repeat(1, 3)
    mask_BT, none_BT = torch.ones(2 * rows, 3), torch.zeros(2 * rows, 3)
    rewards_BT = torch.tensor([0.0, 0.0, paid]).repeat(2 * rows, 1)
    for name in objectives.ADVANTAGES[1:]:
        found = objectives.advantages(name, rewards_BT, none_BT, mask_BT, node_BT, group_B)
        assert found.abs().max() == 0, name
    rewards_BT[rows:, 2] = torch.linspace(0, 1, rows)  # one problem is alive
    for name in ("reinforce++-baseline", "grpo", "dr.grpo", "rloo", "treerl", "siblings"):
        found = objectives.advantages(name, rewards_BT, none_BT, mask_BT, node_BT, group_B)
        assert found[:rows].abs().max() < 1e-5 and found[rows:, 0].abs().max() > 0.4, name


def test_what_has_no_spread_and_no_company_is_defined():
    assert objectives.whiten(torch.randn(3, 4), torch.zeros(3, 4)).abs().max() == 0
    for leave_one_out in (True, False):
        assert objectives.subtract_group_mean(torch.tensor([5.0]), torch.tensor([0]), leave_one_out).item() == 0
    assert torch.isfinite(objectives.entropy(torch.tensor([0.0, -torch.inf]))).all()


def test_a_small_spread_is_one():
    """Rewards a thousandth apart are not rounding."""
    close = torch.tensor([1.0, 1.001, 1.0, 1.001])
    found = objectives.normalise_groups(close, torch.zeros(4, dtype=torch.long))
    torch.testing.assert_close(found, torch.tensor([-1.0, 1.0, -1.0, 1.0]), rtol=0, atol=0.01)
    assert objectives.whiten(close[None], torch.ones(1, 4)).abs().min() > 0.9


def test_equal_rollouts_of_steps_that_are_paid_have_the_advantages_that_the_docstring_says():
    columns = torch.ones(4, 3), torch.zeros(4, 3), torch.ones(4, 3), torch.arange(12).view(4, 3)
    with_steps = objectives.advantages("reinforce++-baseline", *columns, torch.zeros(4, dtype=torch.long))
    assert (
        with_steps[0, 0] == 0
        and with_steps[0, 2] == pytest.approx(2 * float(with_steps[0, 1]))
        and with_steps[0, 2] < 0
    )


def test_a_name_that_is_none_is_refused():
    one = torch.zeros(1, 1)
    for wrong in (
        lambda: objectives.advantages("gae", one, one, one, one.long(), one[0].long()),
        lambda: objectives.kl_penalty(one, one, "k4"),
        lambda: objectives.aggregate(one, "mean"),
        lambda: objectives.importance(one, one, "always"),
    ):
        with pytest.raises(ValueError, match="no "):
            wrong()


def test_a_sample_that_is_masked_and_a_batch_without_any_are_defined():
    weight = torch.tensor([[1.0, 0.5], [0.0, 0.0]])
    for how, divisor in (("token", 1.5), ("sequence", 1.0), ("constant", 1.0)):
        shares, found = objectives.aggregate(weight, how, 4)
        assert found == divisor and shares[1].abs().max() == 0
        shares, found = objectives.aggregate(torch.zeros(2, 3), how, 4)
        assert found == 0 and shares.abs().max() == 0
    outside = torch.full((2, 3), -1)
    for name in ("treerl", "siblings", "treepo"):
        found = getattr(objectives, name)(torch.zeros(2), outside, torch.tensor([0, 1]))
        assert found.abs().max() == 0
    assert not objectives.segment_ends(outside).any()


def test_what_has_no_weight_may_be_anything():
    logp, weight = torch.tensor([[0.0, -300.0]], requires_grad=True), torch.tensor([[1.0, 0.0]])
    far = torch.tensor([[0.0, 300.0]])
    loss, _ = objectives.ppo_loss(logp, -far, far, weight, 1.0)
    loss = loss + objectives.kl_loss(logp, far, weight, 1.0, "k3")
    (grad,) = torch.autograd.grad(loss, logp)
    assert torch.isfinite(loss) and torch.isfinite(grad).all() and grad[0, 1] == 0
