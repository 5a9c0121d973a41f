"""Rewards: who is paid what, and that no path through them is free."""

from dataclasses import replace

import pytest
import torch

from rftt_lightning.core.contracts import Problem, ProblemSource, Rollout, Segment, Status, Step, UserError, Verdict
from rftt_lightning.policy.objectives import returns_to_go
from rftt_lightning.policy.rewards import Blend, Confidence, OutcomeReward, ProcessReward

PROBLEM = Problem("p", "how many?", answer="3")


class Source(ProblemSource):
    """The output "3" is right; a step's text is its score, "-" computes nothing."""

    asked = 0

    def problems(self):
        return [PROBLEM]

    def judge(self, problem, response):
        self.asked += 1
        status = (
            Status.NO_ANSWER if "<output>-" in response else Status.RIGHT if "<output>3" in response else Status.WRONG
        )
        return Verdict(status)

    def check_steps(self, problem, steps):
        return [None if text in "-3" else float(text) for _, text in steps]


def rollout(*steps: tuple[str, str], complete: bool = True) -> Rollout:
    segments = tuple(Segment(tag, (1, 2), (-0.5, -0.5), (0, 0), text, True) for tag, text in steps)
    return Rollout(PROBLEM, (7,), segments, complete)


GOOD = rollout(("next_step", "1"), ("verify", "1"), ("output", "3"))
BAD = rollout(("next_step", "0"), ("next_step", "1"), ("clarify", "-"), ("output", "4"))
SILENT = rollout(("next_step", "1"), ("output", "-"))
BROKEN = rollout(("next_step", "1"), ("verify", "0"), complete=False)


def test_the_outcome_is_paid_on_the_last_segment_alone():
    source = Source()
    scores = OutcomeReward(right=1.0, wrong=0.1, none=-0.2).score(source, [GOOD, BAD, SILENT, BROKEN])
    assert [s.rewards for s in scores] == [(0, 0, 1.0), (0, 0, 0, 0.1), (0, -0.2), (0, -0.2)]
    assert [s.value for s in scores] == [1.0, 0.0, 0.0, 0.0]
    assert source.asked == 3  # an incomplete path has no answer
    assert scores[3].verdict.status is Status.NO_ANSWER


def test_process_scores_are_weighed_and_centred():
    (score,) = ProcessReward(weight=2.0, center=0.5).score(Source(), [BAD])
    assert score.rewards == (-1.0, 1.0, 0.0, 7.0) and score.steps == (0.0, 1.0, None, 4.0)


def test_centred_per_turn_the_use_of_a_tag_is_free():
    scores = ProcessReward(center=None).score(Source(), [GOOD, BAD, SILENT, BROKEN])
    paid: dict[str, float] = {}
    for path, score in zip([GOOD, BAD, SILENT, BROKEN], scores, strict=True):
        for segment, reward in zip(path.segments, score.rewards, strict=True):
            paid[segment.tag] = paid.get(segment.tag, 0.0) + reward
    assert paid == pytest.approx(dict.fromkeys(paid, 0.0))
    assert scores[0].rewards[0] > 0 > scores[1].rewards[0]


def test_a_later_attempt_is_compared_with_later_attempts():
    """Third checks are mostly wrong, first ones right: to check a third time is neither paid nor punished."""
    paths = [
        rollout(("verify", "1"), ("output", "3")),
        rollout(("verify", "1"), ("verify", "1"), ("verify", "0"), ("output", "4")),
        rollout(("verify", "1"), ("verify", "0"), ("verify", "1"), ("output", "4")),
    ]
    rewards = [score.rewards for score in ProcessReward().score(Source(), paths)]
    assert [r[0] for r in rewards] == [0.0, 0.0, 0.0]
    assert [r[1:3] for r in rewards[1:]] == [(0.5, -0.5), (-0.5, 0.5)]


def test_with_credit_by_segment_each_return_is_the_segment_s_own_score():
    """The rewards sit on the last of two tokens; summed to go, both tokens of a segment have what it is worth by itself."""
    own = ProcessReward(weight=0.3).score(Source(), [GOOD, BAD, BROKEN])
    told = ProcessReward(weight=0.3, credit="segment").score(Source(), [GOOD, BAD, BROKEN])
    for path, alone, telescoped in zip([GOOD, BAD, BROKEN], own, told, strict=True):
        rewards = torch.zeros(1, 2 * len(path.segments))
        rewards[0, 1::2] = torch.tensor(telescoped.rewards)
        expected = torch.tensor(alone.rewards).repeat_interleave(2)
        torch.testing.assert_close(returns_to_go(rewards)[0], expected)
    with pytest.raises(UserError, match="credit is 'token'"):
        ProcessReward(credit="token")


def test_a_blend_adds_up_and_keeps_the_verdict():
    paths = [GOOD, BAD, BROKEN]
    outcome, process = OutcomeReward(), ProcessReward(center=0.5)
    blend = Blend(outcome, process, outcome_weight=0.6, process_weight=0.4).score(Source(), paths)
    for both, a, b in zip(blend, outcome.score(Source(), paths), process.score(Source(), paths), strict=True):
        assert both.rewards == pytest.approx([0.6 * x + 0.4 * y for x, y in zip(a.rewards, b.rewards, strict=True)])
        assert (both.verdict, both.value, both.steps) == (a.verdict, a.value, b.steps)


def test_at_inference_the_gold_answer_moves_nothing():
    class Other(Source):
        def judge(self, problem, response):
            return Verdict(Status.WRONG)

    def searched(source: ProblemSource) -> list[tuple[float, tuple[float, ...]]]:
        return [(s.value, s.rewards) for s in Confidence().score(source, [GOOD, BAD, BROKEN])]

    assert searched(Source()) == searched(Other())
    sure = replace(GOOD, segments=tuple(replace(s, logprobs=(-0.1, -0.1)) for s in GOOD.segments))
    low, high = (s.value for s in Confidence().score(Source(), [GOOD, sure]))
    assert 0 <= low < high <= 1


def test_a_reward_says_whether_search_may_follow_it_at_inference():
    assert OutcomeReward().uses_gold and ProcessReward().uses_gold and not Confidence().uses_gold
    assert Blend(OutcomeReward(), Confidence()).uses_gold and not Blend(Confidence(), ProcessReward()).uses_gold


def test_steps_reach_the_checker_as_they_are():
    seen = []

    class Spy(Source):
        def check_steps(self, problem, steps):
            seen.extend(steps)
            return super().check_steps(problem, steps)

    ProcessReward().score(Spy(), [GOOD])
    assert seen == [Step("next_step", "1"), Step("verify", "1"), Step("output", "3")]
