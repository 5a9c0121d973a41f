"""Rewards: who is paid what, and that no path through them is free."""

from dataclasses import replace

import pytest
import torch

from rftt_lightning.core.contracts import Problem, ProblemSource, Rollout, Segment, Status, Step, UserError, Verdict
from rftt_lightning.policy.objectives import returns_to_go
from rftt_lightning.policy.rewards import (
    Blend,
    Confidence,
    FormatReward,
    LengthReward,
    NoisyReward,
    OutcomeReward,
    ProcessReward,
    RandomReward,
    StepScorer,
)

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


# -- step scorers ----------------------------------------------------------------------------------------------------------


class Told(StepScorer):
    """Scores 0.2, 0.4, … in the order of the steps, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[Problem, tuple[Step, ...]]] = []

    def score(self, source, paths):
        self.asked += paths
        return [tuple((i + 1) / 5 for i in range(len(steps))) for _, steps in paths]


def test_scores_come_from_the_scorer_and_of_the_tags_that_are_named():
    scorer = Told()
    reward = ProcessReward(scorer=scorer, center=0.0, tags=["next_step", "output"])
    (score,) = reward.score(Source(), [BAD])
    assert scorer.asked == [(PROBLEM, BAD.steps)]
    assert score.steps == (0.2, 0.4, None, 0.8) and score.rewards == (0.2, 0.4, 0.0, 0.8)
    (everything,) = ProcessReward(scorer=scorer, center=0.0).score(Source(), [BAD])
    assert everything.steps == pytest.approx((0.2, 0.4, 0.6, 0.8))
    with pytest.raises(UserError, match=r"reward\.tags names 'step'"):
        ProcessReward(tags=["step"])


def test_the_released_preset():
    """Each segment is paid its score, the last one 0.6 * correct + 0.4 * score."""
    process = ProcessReward(scorer=Told(), center=0.0, weight=1.0, last_weight=0.4)
    blend = Blend(OutcomeReward(right=1.0, wrong=0.0), process, outcome_weight=0.6, process_weight=1.0)
    right, wrong = blend.score(Source(), [GOOD, BAD])
    assert right.rewards == pytest.approx((0.2, 0.4, 0.6 + 0.4 * 0.6))
    assert wrong.rewards == pytest.approx((0.2, 0.4, 0.6, 0.4 * 0.8))


@pytest.mark.parametrize(
    ("value", "expected"), [("mean", 0.4), ("min", 0.2), ("last", 0.6), ("product", 0.2 * 0.4 * 0.6), ("outcome", 1.0)]
)
def test_search_may_follow_step_scores(value, expected):
    reward = ProcessReward(scorer=Told(), value=value)
    good, broken = reward.score(Source(), [GOOD, BROKEN])
    assert good.value == pytest.approx(expected) and broken.value == 0.0
    assert reward.uses_gold == (value == "outcome")
    assert ProcessReward(value=value).uses_gold  # the exact checker knows the truth
    with pytest.raises(UserError, match=r"reward\.value is 'max'"):
        ProcessReward(value="max")


def test_a_blend_of_many_asks_once_and_adds_up():
    source = Source()
    others = [LengthReward(longest=4, buffer=2, weight=0.5), FormatReward(0.25)]
    blend = Blend(OutcomeReward(), ProcessReward(center=0.0), 1.0, 0.5, others)
    paths = [GOOD, BAD, BROKEN]
    found = blend.score(source, paths)
    assert source.asked == 2  # BROKEN has no answer
    terms = [reward.score(Source(), paths) for reward in (OutcomeReward(), ProcessReward(center=0.0), *others)]
    for i, score in enumerate(found):
        rows = [term[i].rewards for term in terms]
        expected = [a + 0.5 * b + c + d for a, b, c, d in zip(*rows, strict=True)]
        assert score.rewards == pytest.approx(expected) and score.steps == terms[1][i].steps


# -- length, format ----------------------------------------------------------------------------------------------------------


def test_overlong_paths_are_punished_as_in_dapo():
    def dapo(length: int, longest: int, cache: int) -> float:
        if length <= longest - cache:
            return 0.0
        return ((longest - cache) - length) / cache if length <= longest else -1.0

    for steps in range(1, 9):
        path = rollout(*[("next_step", "1")] * steps)
        (score,) = LengthReward(longest=12, buffer=5, weight=0.5).score(Source(), [path])
        assert score.rewards == pytest.approx([0.0] * (steps - 1) + [0.5 * dapo(2 * steps, 12, 5)])
    for longest, buffer in ((0, 0), (4, 5), (4, 0)):
        with pytest.raises(UserError, match="0 < buffer <= longest"):
            LengthReward(longest, buffer)


def test_form_is_paid_whatever_the_answer():
    def paid(*paths: Rollout) -> list[tuple[float, ...]]:
        return [score.rewards for score in FormatReward(1.0, malformed=-0.5).score(Source(), paths)]

    illegal = rollout(("verify", "1"), ("output", "3"))
    empty = rollout(("next_step", " "), ("output", "3"))
    nested = rollout(("next_step", "1 <verify>"), ("output", "3"))
    open_ = replace(GOOD, segments=(replace(GOOD.segments[0], closed=False), *GOOD.segments[1:]))
    wrong = rollout(("next_step", "1"), ("output", "4"))
    assert paid(GOOD, wrong, BROKEN, illegal) == [(0, 0, 1), (0, 1), (0, 0), (0, 0)]
    assert paid(empty, nested, open_) == [(-0.5, 0), (-0.5, 0), (-0.5, 0, 0)]
    assert [s.value for s in FormatReward().score(Source(), [GOOD, wrong, illegal])] == [1, 1, 0]


# -- controls ----------------------------------------------------------------------------------------------------------------


def many(count: int) -> list[Rollout]:
    return [
        replace(rollout(("next_step", str(i % 10)), ("output", "34"[i % 2])), problem=replace(PROBLEM, id=str(i)))
        for i in range(count)
    ]


def test_a_random_reward_hangs_on_the_content_alone():
    paths = many(1000)
    paid = [s.rewards[-1] for s in RandomReward(p=0.3).score(Source(), paths)]
    moved = [
        replace(p, segments=tuple(replace(s, version=7, logprobs=(-9.0, -9.0)) for s in p.segments)) for p in paths
    ]
    assert paid == [s.rewards[-1] for s in reversed(RandomReward(p=0.3).score(Source(), moved[::-1]))]
    assert paid != [s.rewards[-1] for s in RandomReward(p=0.3, seed=1).score(Source(), paths)]
    assert set(paid) == {0.0, 1.0} and 250 < sum(paid) < 350
    scores = RandomReward(p=0.3).score(Source(), paths)
    assert [s.value for s in scores] == paid and all(s.rewards[:-1] == (0.0,) for s in scores)
    assert 0.2 < sum(s.rewards[-1] for s in scores if s.verdict.right) / 500 < 0.4  # right answers are not paid more
    for p in (-0.1, 1.1):
        with pytest.raises(UserError, match=r"reward\.p is"):
            RandomReward(p)


def test_a_noisy_reward_flips_its_share_and_keeps_the_verdict():
    paths = many(1000)
    clean = OutcomeReward().score(Source(), paths)
    noisy = NoisyReward(OutcomeReward(), p=0.25).score(Source(), paths)
    assert [s.verdict for s in noisy] == [s.verdict for s in clean]
    flipped = [a.rewards != b.rewards for a, b in zip(noisy, clean, strict=True)]
    assert 200 < sum(flipped) < 300
    for a, b, other in zip(noisy, clean, flipped, strict=True):
        assert a.value == (1 - b.value if other else b.value)
    assert noisy == NoisyReward(OutcomeReward(), p=0.25).score(Source(), paths[::-1])[::-1]
    assert NoisyReward(OutcomeReward(), p=0.0).score(Source(), paths) == clean
    whole = NoisyReward(OutcomeReward(), p=1.0).score(Source(), [GOOD, BAD, BROKEN])
    assert [s.rewards[-1] for s in whole] == [0.1, 1.0, 0.0]  # no answer stays none
    assert [s.verdict.status for s in whole] == [Status.RIGHT, Status.WRONG, Status.NO_ANSWER]


def test_controls_say_whether_they_see_the_gold_answer():
    class Other(Source):
        def judge(self, problem, response):
            return Verdict(Status.WRONG)

    for reward in (RandomReward(), FormatReward(), ProcessReward(scorer=Told(), value="min")):
        assert not reward.uses_gold
        here, there = (reward.score(source, [GOOD, BAD]) for source in (Source(), Other()))
        assert [(s.value, s.rewards) for s in here] == [(s.value, s.rewards) for s in there]
    assert LengthReward(4, 2).uses_gold and NoisyReward(OutcomeReward()).uses_gold
    assert not NoisyReward(FormatReward()).uses_gold


@pytest.mark.parametrize(
    "reward",
    [
        OutcomeReward(),
        ProcessReward(),
        ProcessReward(credit="segment", tags=["next_step", "output"], value="mean"),
        Blend(OutcomeReward(), ProcessReward(), 1.0, 0.5, others=[ProcessReward(tags=["verify"]), FormatReward()]),
        NoisyReward(ProcessReward(), p=0.5),
        RandomReward(),
        LengthReward(longest=6, buffer=4),
    ],
    ids=lambda reward: type(reward).__name__,
)
def test_scored_in_pieces_and_then_together_is_scored_together(reward):
    """Search hands over rollouts as they end; a mean that is taken off must be that of all of them in the end."""
    paths = [
        GOOD,
        BAD,
        SILENT,
        BROKEN,
        rollout(("next_step", "0"), ("verify", "0.5"), ("verify", "0"), ("output", "3")),
    ]
    together = reward.score(Source(), paths)
    pieces = [reward.score(Source(), [path])[0] for path in paths]
    source = Source()
    again = reward.score(source, [replace(path, score=score) for path, score in zip(paths, pieces, strict=True)])
    assert again == together
    assert source.asked == 0 or isinstance(reward, NoisyReward)  # whose reward is to hear of no true verdict
    if isinstance(reward, (ProcessReward, Blend)):
        assert again != pieces


def test_a_scorer_is_not_asked_twice_for_the_same_rollout():
    class Once(StepScorer):
        asked = 0

        def score(self, source, paths):
            self.asked += len(paths)
            return [tuple(0.5 for _ in steps) for _, steps in paths]

    scorer = Once()
    reward = ProcessReward(scorer=scorer)
    (score,) = reward.score(Source(), [GOOD])
    reward.score(Source(), [replace(GOOD, score=score), BAD])
    assert scorer.asked == 2
