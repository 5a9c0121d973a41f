import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rftt_lightning.core.contracts import Problem, Rollout, Score, Segment, Status, Verdict
from rftt_lightning.search.problems import JsonlProblems
from rftt_lightning.search.vote import Accuracy, answer_of, best, scores, vote


def rollout(answer, logprob=-0.5, steps=(), complete=True):
    segment = Segment("output", (1, 2), (logprob, logprob), (0, 0), answer or "", complete)
    status = Status.WRONG if answer else Status.NO_ANSWER
    return Rollout(
        Problem("p", "?"),
        (),
        (segment,),
        complete,
        score=Score(Verdict(status, answer), 0.0, (0.0,), steps),
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
    assert answer_of(vote(rollouts, {}, scores(rollouts))) == answer_of(best(rollouts)) == "2"


def test_answers_that_are_the_same_vote_together():
    rollouts = [rollout("7"), rollout("0.5"), rollout("7.5"), rollout("1/2")]
    assert vote(rollouts) is rollouts[0]
    assert vote(rollouts, {"1/2": "0.5"}) is rollouts[1]


def judged(answers, gold, tmp_path):
    """Rollouts with these answers as the maths judge has them, and which of them are the same."""
    (tmp_path / "p.jsonl").write_text(json.dumps({"question": "?", "answer": gold}) + "\n")
    source = JsonlProblems(str(tmp_path / "p.jsonl"))
    (problem,) = source.problems()
    verdicts = source.judge_many([(problem, rf"\boxed{{{answer}}}") for answer in answers])
    found = [replace(rollout(a), score=Score(v, 0.0, (0.0,))) for a, v in zip(answers, verdicts, strict=True)]
    return found, source.same([answer_of(r) for r in found])


@pytest.mark.parametrize("gold", ["1/2", r"\frac{1}{2}", "0.5", r"\frac{1}{3}", "1/3", "7", "x+1"])
@pytest.mark.parametrize("seed", range(3))
def test_the_majority_does_not_hang_on_the_gold_answer_nor_on_spelling(tmp_path, gold, seed):
    """Four halves beat three thirds, though no half is written more than twice."""
    halves, thirds = ["1/2", "1/2", r"\frac{1}{2}", "0.5"], [r"\frac{1}{3}"] * 3
    rollouts, same = judged(random.Random(seed).sample(halves + thirds, 7), gold, tmp_path)
    assert answer_of(vote(rollouts, same)) in halves
    assert len(set(same.values())) == 2


def test_paths_are_scored_by_their_steps_or_else_all_by_the_policys_confidence():
    sure, unsure = rollout("1", logprob=-0.1), rollout("1", logprob=-0.5)
    assert scores([sure, unsure]) == pytest.approx([math.exp(-0.1), math.exp(-0.5)])
    scored, cut = rollout("2", steps=(0.25, None, 0.75)), rollout("2", steps=(0.9,), complete=False)
    assert scores([sure, scored, rollout("3", steps=(None,)), cut]) == [0, 0.5, 0, 0]
    assert best([sure, scored]) is vote([sure, scored], {}, scores([sure, scored])) is scored


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
