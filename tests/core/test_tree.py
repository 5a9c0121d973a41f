import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rftt_lightning.core.contracts import Problem, Provenance, Sampling, Score, Segment, Status, Verdict
from rftt_lightning.core.tree import Plan, Tree
from rftt_lightning.search.driver import grow
from rftt_lightning.search.expand import TokenExpander
from scripted import ScriptedBackend, ScriptedReward, ScriptedSource, table_of

PROBLEM = Problem("p/1", "what ?", "7", data={"numbers": [1, 2]})
GRAMMAR = {"question": ["a", "b"], "a": ["a", "b", "out"], "b": ["a", "out"], "out": []}


def segment(tag, text="x", priors=None):
    return Segment(tag, (5, 6, 7), (-0.1, -0.2, -0.3), (2, 0, 0), text, True, priors or {})


def score(value, status=Status.WRONG):
    return Score(Verdict(status, "1", "2", "r", ("1", "2")), value, (0.0, value), (None, 0.5))


def random_tree(seed: int, rollouts: int = 12) -> Tree:
    """Grown by hand, without any expander: random plans, random ends, selected by UCT."""
    rng = random.Random(seed)
    tree = Tree(PROBLEM, (1, 2))
    tree.plan(0, [Plan(f"t{i}", rng.random()) for i in range(rng.randint(1, 3))])
    for _ in range(rollouts):
        node = tree.select(2.0)
        if node is None:
            break
        while True:
            tree.fill(node, segment(tree.tag(node), f"step {node}"))
            if rng.random() < 0.4:
                break
            node = tree.plan(node, [Plan(f"t{i}", rng.random()) for i in range(rng.randint(1, 3))])[0]
        tree.end(node, rng.random() < 0.5)
        tree.backup(node, score(rng.random()))
    return tree


def uct_by_recount(tree: Tree, node: int, c: float) -> float:
    """From the list of leaves alone."""

    def through(k):
        return [score.value for leaf, score in tree.leaves if k == 0 or k in tree.path(leaf)]

    mine, above = through(node), through(tree.parent[node])
    return sum(mine) / len(mine) + c * math.sqrt(math.log(len(above)) / len(mine))


def select_by_loop(tree: Tree, c: float) -> int | None:
    """Slow and obvious, for a tree at rest."""
    node = 0
    while True:
        for child in tree.children[node]:
            if tree.segments[child] is None:
                return child
        best, most = None, -math.inf
        for child in tree.children[node]:
            below = [k for k in range(len(tree)) if child in tree.path(k)]
            if all(tree.segments[k] is not None for k in below):
                continue  # nothing planned is left below
            if uct_by_recount(tree, child, c) > most:
                best, most = child, uct_by_recount(tree, child, c)
        if best is None:
            return None
        node = best


@given(st.integers(0, 10**6), st.integers(1, 30), st.sampled_from([0.0, 0.5, 2.0]))
def test_select_is_the_plain_loop(seed, rollouts, c):
    tree = random_tree(seed, rollouts)
    assert tree.select(c) == select_by_loop(tree, c)
    assert (tree.select(c) is None) == tree.spent[0]


@given(st.integers(0, 10**6), st.integers(1, 30))
def test_backup_is_a_recount_from_the_leaves(seed, rollouts):
    tree = random_tree(seed, rollouts)
    tree.check()
    for node in range(len(tree)):
        through = [score.value for leaf, score in tree.leaves if node == 0 or node in tree.path(leaf)]
        assert tree.visits[node] == len(through)
        assert tree.values[node] == pytest.approx(sum(through))
        if node and tree.visits[node]:
            assert tree.uct([node], 2.0)[0] == pytest.approx(uct_by_recount(tree, node, 2.0))


@given(st.integers(0, 10**6))
def test_a_finite_tree_ends_and_no_leaf_is_visited_twice(seed):
    tree = random_tree(seed, rollouts=200)
    leaves = [leaf for leaf, _ in tree.leaves]
    assert len(set(leaves)) == len(leaves)
    if len(leaves) < 200:
        assert tree.select(2.0) is None and all(segment is not None for segment in tree.segments[1:])


@given(st.integers(0, 10**6))
def test_json_gives_an_equal_tree_back(seed):
    tree = random_tree(seed)
    back = Tree.from_json(json.loads(json.dumps(tree.to_json())))
    assert back == tree
    assert all(isinstance(plan, Plan) and isinstance(plan.chosen, Provenance) for plan in back.plans)
    assert back.rollouts() == tree.rollouts() and back.select(2.0) == tree.select(2.0)
    back.check()


def test_held_nodes_are_visits_of_value_zero():
    tree = Tree(PROBLEM, (1,))
    a, b = tree.plan(0, [Plan("a", 0.5), Plan("b", 0.5)])
    for node, value in ((a, 1.0), (b, 0.0)):
        tree.fill(node, segment(tree.tag(node)))
        tree.plan(node, [Plan("c", 1.0), Plan("d", 1.0)])
        leaf = tree.children[node][0]
        tree.fill(leaf, segment("c"))
        tree.end(leaf, True)
        tree.backup(leaf, score(value))
    d = tree.children[a][1]
    tree.hold(d)
    assert tree.uct([a], 2.0)[0] == pytest.approx(1 / 2 + 2 * math.sqrt(math.log(3) / 2))
    assert tree.uct([b], 2.0)[0] == pytest.approx(0 / 1 + 2 * math.sqrt(math.log(3) / 1))
    tree.hold(d, -1)
    assert tree.uct([a], 2.0)[0] == pytest.approx(1 + 2 * math.sqrt(math.log(2)))
    tree.check()


def test_where_the_best_child_is_all_held_the_next_best_is_taken():
    tree = Tree(PROBLEM, (1,))
    for node in tree.plan(0, [Plan("a", 0.5), Plan("b", 0.5)]):
        tree.fill(node, segment(tree.tag(node)))
        done, _ = tree.plan(node, [Plan("c", 1.0), Plan("d", 1.0)])
        tree.fill(done, segment("c"))
        tree.end(done, True)
        tree.backup(done, score(1.0 if node == 1 else 0.0))
    first = tree.select(0.0)
    tree.hold(first)
    second = tree.select(0.0)
    tree.hold(second)
    assert (tree.parent[first], tree.parent[second]) == (1, 2)
    assert tree.select(0.0) is None


def test_root_is_asked_once():
    tree = Tree(PROBLEM, (1,))
    assert tree.select(2.0) == 0
    tree.hold(0)
    assert tree.select(2.0) is None


BREAKS = {
    "younger": lambda t: t.children[0].append(0),
    "lists it once": lambda t: t.children[0].remove(2),
    "N = ": lambda t: t.visits.__setitem__(1, 5),
    "W = ": lambda t: t.values.__setitem__(1, 0.25),
    "0 <= W <= N": lambda t: (
        t.leaves.__setitem__(0, (3, score(1.5))),
        [t.values.__setitem__(k, 1.5) for k in (0, 1, 3)],
    ),
    "have segments": lambda t: t.segments.__setitem__(1, None),
    "was planned": lambda t: t.segments.__setitem__(1, segment("other")),
    "has no children": lambda t: t.ends.__setitem__(1, True),
    "one rollout ends": lambda t: t.ends.__setitem__(3, None),
    "spent": lambda t: t.spent.__setitem__(3, False),
    "under way": lambda t: t.hold(2),
}


@pytest.mark.parametrize("rule, spoil", BREAKS.items())
def test_check_names_every_broken_rule(rule, spoil):
    tree = Tree(PROBLEM, (1,))
    tree.plan(0, [Plan("a", 0.5), Plan("b", 0.5)])
    tree.fill(1, segment("a"))
    tree.plan(1, [Plan("out", 1.0), Plan("b", 0.2)])
    tree.fill(3, segment("out"))
    tree.end(3, True)
    tree.backup(3, score(0.5))
    tree.check()
    spoil(tree)
    with pytest.raises(ValueError, match=rule):
        tree.check()


@pytest.mark.parametrize("node, tag", [(0, "question"), (1, "b"), (2, "b")])
def test_fill_takes_only_what_was_planned(node, tag):
    tree = Tree(PROBLEM, (1,))
    tree.plan(0, [Plan("a", 0.5), Plan("b", 0.5)])
    tree.fill(2, segment("b"))
    with pytest.raises(ValueError, match="cannot take"):
        tree.fill(node, segment(tag))


# -- golden trees, worked out by hand ----------------------------------------------------------------------------------


def golden(priors, values, **settings) -> tuple[Tree, ScriptedBackend]:
    """Four rollouts; the policy takes its favourite tag, the rewards of the rollouts come in the order of ``values``."""
    table = table_of(GRAMMAR)
    backend = ScriptedBackend(table, priors)
    expander = TokenExpander(rollouts=4, sampling=Sampling(boundary="argmax", min_prior=0.05), **settings)
    expander.table = table
    coming = iter(values)
    reward = ScriptedReward(table, value=lambda rollout, verdict: next(coming))
    [(_, tree)] = grow(ScriptedSource(1).problems(), expander, backend, reward, ScriptedSource(1))
    tree.check()
    return tree, backend


def test_golden_tree_of_legal_children():
    r"""After the third rollout Q(a) = 0/1, Q(b) = 1/2, N = 3: UCT(a) = 2 sqrt(ln 3) = 2.10 > UCT(b) = 0.5 + 2 sqrt(ln 3 / 2) = 1.98,
    so the fourth goes below a again, to a's most probable child that is not yet visited."""
    priors = {"question": {"a": 0.6, "b": 0.4}, "a": {"out": 0.5, "a": 0.3, "b": 0.2}, "b": {"out": 0.9, "a": 0.1}}
    tree, backend = golden(priors, [0, 1, 0, 1])
    assert [r.force for batch in backend.batches for r in batch] == [None, "b", "a", "a"]
    assert [tree.tag(k) for k in range(1, len(tree))] == "a b out a b out a out a b out a b".split()
    assert tree.parent[1:] == [0, 0, 1, 1, 1, 2, 2, 7, 7, 7, 4, 4, 4]
    assert [leaf for leaf, _ in tree.leaves] == [3, 6, 8, 11]
    assert [[tree.tag(k) for k in tree.path(leaf)] for leaf, _ in tree.leaves] == [
        ["a", "out"],
        ["b", "out"],
        ["b", "a", "out"],
        ["a", "a", "out"],
    ]
    assert tree.visits == [4, 2, 2, 1, 1, 0, 1, 1, 1, 0, 0, 1, 0, 0]
    assert tree.values == [2, 1, 1, 0, 1, 0, 1, 0, 0, 0, 0, 1, 0, 0]
    assert [k for k in range(len(tree)) if tree.spent[k]] == [3, 6, 8, 11]
    assert tree.select(2.0) == 5  # a: 1/2 + 2 sqrt(ln 4 / 2) = b's; the elder, whose planned child b waits
    chosen = [tree.segments[k].provenance[0] for k in (1, 2, 3, 4, 7, 11)]
    assert chosen == [
        Provenance.ARGMAX,
        Provenance.UCT,
        Provenance.ARGMAX,
        Provenance.UCT,
        Provenance.UCT,
        Provenance.ARGMAX,
    ]


def test_golden_tree_of_drawn_children():
    """Tags under min_prior are not drawn, so every draw is known here; two children may share a tag. After the third
    rollout b's place, node 2, is spent, and the last free node, 4, is below node 1."""
    priors = {"question": {"a": 0.97, "b": 0.03}, "a": {"out": 0.96, "a": 0.02, "b": 0.02}}
    tree, backend = golden(priors, [0, 1, 0, 1], children="drawn", width=2)
    assert [r.force for batch in backend.batches for r in batch] == [None, "a", "out", "out"]
    assert [r.forced_as for batch in backend.batches for r in batch][1:] == [Provenance.SAMPLED] * 3
    assert [tree.tag(k) for k in range(1, len(tree))] == "a a out out out out".split()
    assert tree.parent[1:] == [0, 0, 1, 1, 2, 2]
    assert [leaf for leaf, _ in tree.leaves] == [3, 5, 6, 4]
    assert tree.visits == [4, 2, 2, 1, 1, 1, 1]
    assert tree.values == [2, 1, 1, 0, 1, 1, 0]
    assert all(tree.spent) and tree.select(2.0) is None
    assert tree.segments[1].text != tree.segments[2].text


def test_golden_picture():
    tree = Tree(Problem("p/1", "what is 3 * 7 ?"), (1,))
    tree.plan(0, [Plan("next_step", 0.6), Plan("clarify", 0.4)])
    tree.fill(1, segment("next_step", "3 * 7\n = 21"))
    out, _ = tree.plan(1, [Plan("output", 0.7), Plan("verify", 0.3)])
    tree.fill(out, segment("output", "a long answer that is cut"))
    tree.end(out, True)
    tree.backup(out, score(1.0, Status.RIGHT))
    tree.fill(2, segment("clarify", ""))
    tree.end(2, False)
    tree.backup(2, score(0.0, Status.NO_ANSWER))
    assert tree.render(width=13).splitlines() == [
        "p/1: what is 3 * 7 ?",
        "├─ next_step N=1 Q=1.00  3 * 7 = 21",
        "│  └─ output N=1 Q=1.00  a long answer  [right]",
        "└─ clarify N=1 Q=0.00    [no_answer]",
    ]


def test_rollout_is_its_path():
    tree = random_tree(3)
    for rollout in tree.rollouts():
        leaf = rollout.nodes[-1]
        assert rollout.prompt + tuple(t for s in rollout.segments for t in s.tokens) == tree.tokens(leaf)
        assert rollout.complete == tree.ends[leaf] and rollout.score is not None
        assert rollout.length == 3 * len(rollout.steps)
