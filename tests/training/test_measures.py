"""Measures are what plain loops count, and add up over ranks."""

import json
import math

import pytest

from rftt_lightning.core.contracts import Problem, Rollout, Score, Segment, Status, Verdict
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Plan, Tree
from rftt_lightning.search.problems import JsonlProblems
from rftt_lightning.tiny.countdown import Countdown
from rftt_lightning.training import measures
from tests.sick import Guess, grown

TABLE = TokenTable.from_yaml()
SOURCE = Guess()


@pytest.fixture(scope="module")
def trees():
    return grown(1, 0, repr(({"verify": 3.0}, 1.0, 0.25, 0.4, {"verify": 0.5}, 0.0)))


@pytest.fixture(scope="module")
def found(trees):
    return measures.rates(measures.count(trees, TABLE, SOURCE))


def test_shares_of_rollouts_and_groups(trees, found):
    paths = [path for tree in trees for path in tree.rollouts()]
    n = len(paths)
    assert found["length"] == pytest.approx(sum(len(s.tokens) for p in paths for s in p.segments) / n)
    assert found["complete"] == pytest.approx(sum(p.complete for p in paths) / n)
    assert found["tree/depth"] == pytest.approx(sum(len(p.segments) for p in paths) / n)
    segments = [s for p in paths for s in p.segments]
    assert found["malformed"] == pytest.approx(sum(not s.closed for s in segments) / len(segments))
    for name in TABLE.names:
        assert found[f"functional_tokens/{name}"] == pytest.approx(sum(s.tag == name for s in segments) / n)
    checks = sum(s.tag == "verify" for s in segments)
    right = sum(p.score.verdict.right for p in paths if p.segments[-1].tag == "verify")
    assert found["rewards/verify"] == pytest.approx((0.5 * checks + right) / n)
    kinds = [{p.score.verdict.right for p in tree.rollouts()} for tree in trees]
    for name, kind in (("all_right", {True}), ("all_wrong", {False}), ("mixed", {True, False})):
        assert found[f"groups/{name}"] == pytest.approx(kinds.count(kind) / len(trees))


def test_repairs_compare_the_attempt_before_the_first_check_with_the_end(trees, found):
    before_after = []
    for path in (path for tree in trees for path in tree.rollouts()):
        tags = [segment.tag for segment in path.segments]
        first = min((tags.index(c) for c in ("verify", "refine") if c in tags), default=None)
        if first is not None:
            verdict = SOURCE.judge(path.problem, TABLE.render(path.steps[:first]))
            before_after.append((verdict.right, path.score.verdict.right))
    n = sum(len(tree.leaves) for tree in trees)
    assert 0 < len(before_after) < n
    assert found["repair/checked"] == pytest.approx(len(before_after) / n)
    assert found["repair/wrong_to_right"] == pytest.approx(before_after.count((False, True)) / n)
    assert found["repair/right_to_wrong"] == pytest.approx(before_after.count((True, False)) / n)
    assert found["repair/net"] == pytest.approx(found["repair/wrong_to_right"] - found["repair/right_to_wrong"])


@pytest.mark.parametrize(
    ("domain", "steps", "pair"),
    [
        ("maths", [("next_step", "$3+4=7$"), ("verify", "right"), ("next_step", "$7+5=12$")], (None, True)),
        ("maths", [("verify", "nothing yet")], (None, True)),
        ("maths", [("direct_answer", "$3+4+5=11$"), ("verify", "wrong"), ("refine", "$7+5=12$")], (False, True)),
        ("maths", [("next_step", r"so \boxed{12}"), ("verify", "right")], (True, True)),
        ("maths", [("next_step", "The answer is 13."), ("refine", "$7+5=12$")], (False, True)),
        ("countdown", [("next_step", "3 + 4 = 7 ; 7 5"), ("verify", "7 , 12 ; wrong")], (None, True)),
        ("countdown", [("direct_answer", "3 + 4 = 7 , 7 * 5 = 35"), ("verify", "35 , 12 ; wrong")], (False, True)),
    ],
)
def test_a_check_on_the_way_to_an_answer_is_no_repair(domain, steps, pair, tmp_path):
    """Or checks of nothing would look like repairs, and hide that they do nothing."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"question": "3 4 5 ?", "answer": "12"}) + "\n")
    source = Countdown() if domain == "countdown" else JsonlProblems(str(tmp_path / "p.jsonl"))
    problem = Problem("p", "3 4 5 target 12", "12", data={"numbers": [3, 4, 5], "target": 12})
    end = ("output", r"\boxed{12}")
    segments = tuple(Segment(tag, (1,), (0.0,), (0,), text, True) for tag, text in (*steps, end))
    rollout = Rollout(problem, (), segments, True, score=Score(Verdict(Status.RIGHT), 1.0, (0.0,) * len(segments)))
    assert measures.attempts([rollout], source, TABLE) == [pair]


class Slow(Guess):
    """Verdicts on "slow" time out, "12" is right; every attempt is one."""

    def attempted(self, problem, steps):
        return True

    def judge(self, problem, response):
        statuses = {"slow": Status.TIMED_OUT, "12": Status.RIGHT}
        return Verdict(next((status for text, status in statuses.items() if text in response), Status.WRONG))


@pytest.mark.parametrize(
    ("attempt", "end", "pairs"),
    [("11", "right", [(False, True)]), ("slow", "right", []), ("12", "timed_out", []), ("slow", "timed_out", [])],
)
def test_a_verdict_that_timed_out_makes_no_repair_and_breaks_nothing(attempt, end, pairs):
    """Such a rollout has checked itself all the same."""
    tree = Tree(Problem("p", "q"), (1,))
    (first,) = tree.plan(0, [Plan("next_step", 1.0)])
    tree.fill(first, Segment("next_step", (2,), (-1.0,), (0,), attempt, True, {"verify": 1.0}))
    (node,) = tree.plan(first, [Plan("verify", 1.0)])
    tree.fill(node, Segment("verify", (3,), (-1.0,), (0,), "x", True, {"output": 1.0}))
    tree.end(node, True)
    tree.backup(node, Score(Verdict(Status(end)), 0.0, (0.0, 0.0)))
    assert measures.attempts(tree.rollouts(), Slow(), TABLE) == pairs
    found = measures.rates(measures.count([tree], TABLE, Slow()))
    repaired = float(pairs == [(False, True)])
    assert [found[f"repair/{name}"] for name in ("checked", "wrong_to_right", "net")] == [1.0, repaired, repaired]


def test_nodes_count_once(trees, found):
    written = [(tree, node) for tree in trees for node in range(1, len(tree)) if tree.visits[node]]
    parents = {(id(tree), tree.parent[node]) for tree, node in written}
    assert found["tree/branching"] == pytest.approx(len(written) / len(parents))
    assert found["tree/visited"] == pytest.approx(len(written) / sum(len(tree) - 1 for tree in trees))
    shares = {}
    for tree, node in written:
        priors = [p for p in tree.segments[node].priors.values() if p]
        if len(tree.segments[node].priors) > 1:
            share = -sum(p * math.log(p) for p in priors) / math.log(len(tree.segments[node].priors))
            shares.setdefault(tree.tag(node), []).append(share)
    everywhere = [share for values in shares.values() for share in values]
    assert found["boundary/entropy"] == pytest.approx(sum(everywhere) / len(everywhere))
    for name, values in shares.items():
        assert found[f"boundary_entropy/{name}"] == pytest.approx(sum(values) / len(values))
    assert "boundary_entropy/output" not in found


def test_entropy_is_zero_where_certain_and_one_where_uniform():
    assert measures.uncertainty({"a": 1.0, "b": 0.0}) == 0
    assert measures.uncertainty(dict.fromkeys("abc", 1 / 3)) == pytest.approx(1)


def test_a_boundary_without_a_choice_has_no_entropy():
    tree = Tree(Problem("p", "q"), (1,))
    (node,) = tree.plan(0, [Plan("direct_answer", 1.0)])
    tree.fill(node, Segment("direct_answer", (2, 3), (-1.0, -1.0), (0, 0), "x", True, {"output": 1.0}))
    tree.end(node, True)
    tree.backup(node, Score(Verdict(Status.WRONG), 0.0, (0.0,)))
    assert "boundary/entropy" not in measures.rates(measures.count([tree], TABLE, SOURCE))


def test_ranks_add_up(trees, found):
    parts = [measures.count(part, TABLE, SOURCE) for part in (trees[:3], [], trees[3:])]
    assert len({tuple(part) for part in parts}) == 1, "the same names in the same order, also without trees"
    total = {name: sum(part[name] for part in parts) for name in parts[0]}
    assert measures.rates(total) == pytest.approx(found)


def group(*statuses: str) -> list[Rollout]:
    return [Rollout(Problem("p", "q"), (1,), (), True, (), Score(Verdict(Status(s)), 0.5, ())) for s in statuses]


@pytest.mark.parametrize(
    "statuses, alive",
    [
        (("right", "wrong"), True),
        (("right", "no_answer", "right"), True),
        (("right", "right"), False),
        (("wrong", "no_answer", "timed_out"), False),
        (("right",), False),
        ((), False),
    ],
)
def test_a_group_is_alive_if_some_are_right_and_some_are_not(statuses, alive):
    assert measures.mixed(group(*statuses)) == alive
