"""Groups by their outcomes."""

import pytest

from rftt_lightning.core.contracts import Problem, Rollout, Score, Status, Verdict
from rftt_lightning.training import measure


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
    assert measure.mixed(group(*statuses)) == alive


def test_dead_groups_are_shares_of_all_problems():
    """A problem all of whose verdicts timed out, and were dropped, is neither."""
    groups = [group("right", "right"), group("wrong", "no_answer"), group("right", "wrong"), group(), group("wrong")]
    found = measure.of_groups(groups, float)
    assert found == {"problems": 5.0, "dead_groups/all_right": 0.2, "dead_groups/all_wrong": 0.4}
    twice = measure.of_groups(groups, lambda value: 2.0 * value)  # two ranks
    assert twice == found | {"problems": 10.0}
