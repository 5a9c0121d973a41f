import math
import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rftt_lightning.core.contracts import Problem, Rollout, Score, Segment, Status, Verdict
from rftt_lightning.search.vote import Accuracy, answer_of, best, score_of, vote


def rollout(answer, logprob=-0.5, steps=(), complete=True, forms=None):
    segment = Segment("output", (1, 2), (logprob, logprob), (0, 0), answer or "", complete)
    status = Status.WRONG if answer else Status.NO_ANSWER
    return Rollout(
        Problem("p", "?"),
        (),
        (segment,),
        complete,
        score=Score(Verdict(status, answer, forms=forms), 0.0, (0.0,), steps),
    )


@given(st.lists(st.sampled_from(["1", "2", "3", None]), max_size=20))
def test_majority_is_the_most_common_answer_the_earliest_of_equals(answers):
    counts = Counter(a for a in answers if a)
    winner = vote([rollout(a) for a in answers])
    expected = next((a for a in answers if a and counts[a] == max(counts.values())), None)
    assert (winner and answer_of(winner)) == expected


def test_weights_decide_against_numbers():
    rollouts = [rollout("1", steps=(0.1,)), rollout("1", steps=(0.2,)), rollout("2", steps=(0.9,))]
    assert answer_of(vote(rollouts)) == "1"
    assert answer_of(vote(rollouts, score_of)) == answer_of(best(rollouts)) == "2"


def test_answers_of_one_normal_form_vote_together():
    rollouts = [rollout("7", forms=("g", "7")), rollout("0.5", forms=("g", "1/2")), rollout("1/2", forms=("g", "1/2"))]
    assert vote(rollouts) is rollouts[1]


def test_scores_are_step_scores_or_else_the_policys_confidence():
    assert score_of(rollout("1", steps=(0.25, None, 0.75))) == 0.5
    assert (
        score_of(rollout("1", logprob=-0.5, steps=(None,))) == rollout("1").confidence == pytest.approx(math.exp(-0.5))
    )
    assert score_of(rollout("1", steps=(0.9,), complete=False)) == 0.0


def test_without_answers_nobody_wins():
    assert vote([]) is best([]) is vote([rollout(None)]) is best([rollout(None)]) is None


def test_intervals_cover_about_95_percent():
    rng = random.Random(0)
    inside = 0
    for _ in range(300):
        right = sum(rng.random() < 0.3 for _ in range(200))
        found = Accuracy.of(right, 200)
        assert 0 <= found.low <= found.accuracy <= found.high <= 1
        inside += found.low <= 0.3 <= found.high
    assert 0.91 < inside / 300 < 0.99
    assert str(Accuracy.of(180, 500)) == "36.0 [31.9, 40.3]"  # the Wilson interval
