import json
import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rftt_lightning.core.contracts import Problem, Rollout, Score, Segment, Status, Verdict
from rftt_lightning.policy.rewards import ProcessReward, StepScorer
from rftt_lightning.search.problems import JsonlProblems
from rftt_lightning.search.vote import Accuracy, answer_of, best, vote, worth
from scripted import ScriptedSource


def rollout(answer, value=0.5, complete=True):
    segment = Segment("output", (1, 2), (-0.5, -0.5), (0, 0), answer or "", complete)
    status = Status.WRONG if answer else Status.NO_ANSWER
    return Rollout(
        Problem("p", "?"),
        (),
        (segment,),
        complete,
        score=Score(Verdict(status, answer), value, (0.0,)),
    )


@given(st.lists(st.sampled_from(["1", "2", "3", None]), max_size=20))
def test_majority_is_the_most_common_answer_the_earliest_of_equals(answers):
    counts = Counter(a for a in answers if a)
    winner = vote([rollout(a) for a in answers])
    expected = next((a for a in answers if a and counts[a] == max(counts.values())), None)
    assert (winner and answer_of(winner)) == expected


def test_weights_decide_against_numbers():
    rollouts = [rollout("1", 0.1), rollout("1", 0.2), rollout("2", 0.9)]
    assert answer_of(vote(rollouts)) == "1"
    assert answer_of(vote(rollouts, {}, worth)) == answer_of(best(rollouts)) == "2"


def test_answers_that_are_the_same_vote_together():
    rollouts = [rollout("7"), rollout("0.5"), rollout("7.5"), rollout("1/2")]
    assert vote(rollouts) is rollouts[0]
    assert vote(rollouts, {"1/2": "0.5"}) is rollouts[1]


def test_a_verdict_that_timed_out_does_not_speak_for_the_same_answer_in_time():
    known = rollout("1/2")
    late = replace(rollout("0.5"), score=Score(Verdict(Status.TIMED_OUT, "0.5"), 0.5, (0.0,)))
    assert vote([late, known, rollout("0.5"), rollout("7")], {"1/2": "0.5"}) is known
    assert vote([late, rollout("7"), late]) is late


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


@pytest.mark.parametrize("value", ["mean", "min", "last", "product"])
def test_a_path_is_worth_what_search_backed_up(value):
    """A process reward steers the search and chooses its answer by the same number; what it could not score is worth nothing."""

    class Scores(StepScorer):
        def score(self, source, paths):
            return [tuple(float(x) if x else None for x in steps[0].text.split("/")) for _, steps in paths]

    source, reward = ScriptedSource(), ProcessReward(scorer=Scores(), value=value)
    paths = [replace(rollout(text), score=None) for text in (".9", ".6", "", ".99")]
    paths[3] = replace(paths[3], complete=False)
    scored = [replace(r, score=s) for r, s in zip(paths, reward.score(source, paths), strict=True)]
    assert [worth(r) for r in scored] == [0.9, 0.6, 0.0, 0.0] and best(scored) is scored[0]
    assert worth(replace(scored[0], score=None)) == 0.0


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
