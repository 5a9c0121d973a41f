"""Runs that are sick, or healthy: a world of guesses and a gameable PRM for real runs, named by ``class_path``, and histories of
metrics measured on trees of a scripted policy that falls ill."""

from __future__ import annotations

import math
import random
from ast import literal_eval
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import islice, product

import torch

from rftt_lightning.core.contracts import (
    Problem,
    ProblemSource,
    Reward,
    Rollout,
    Sampling,
    Score,
    Status,
    Verdict,
)
from rftt_lightning.core.tree import Tree
from rftt_lightning.policy.objectives import sampler_gap
from rftt_lightning.search.driver import grow
from rftt_lightning.search.expand import TokenExpander
from rftt_lightning.training import measures
from tests.scripted import ScriptedBackend, ScriptedSource, uniform
from tests.sft_world import WORDS

# -- real runs --------------------------------------------------------------------------------------------------------------


class Guess(ScriptedSource):
    """Questions of three words, and answers of which ``share`` are right by a hash of their text: nothing can be learned."""

    def __init__(self, start: int = 0, count: int = 150, share: float = 0.4) -> None:
        asked = islice(product(WORDS, repeat=3), start, start + count)
        self.list = [Problem(f"guess/{start + i}", " ".join(words), "one") for i, words in enumerate(asked)]
        self.share = share

    def judge(self, problem: Problem, response: str) -> Verdict:
        right = uniform(problem.id, response) < self.share
        return Verdict(Status.RIGHT if right else Status.WRONG, response, problem.answer, "guessed")


class GameablePRM(Reward):
    """``weight`` for a right path, finished or not, and a process reward that likes every check it sees: ``pay`` for each verify
    segment, whatever it says."""

    def __init__(self, pay: float = 0.5, weight: float = 1.0) -> None:
        self.pay, self.weight = pay, weight

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        asked = [
            (rollout.problem, "".join(f"<{tag}>{text}</{tag}>" for tag, text in rollout.steps)) for rollout in rollouts
        ]
        return [self._score(*pair) for pair in zip(rollouts, source.judge_many(asked), strict=True)]

    def _score(self, rollout: Rollout, verdict: Verdict) -> Score:
        rewards = [self.pay * (segment.tag == "verify") for segment in rollout.segments]
        rewards[-1] += self.weight * verdict.right
        return Score(verdict, float(verdict.right), tuple(rewards))


# -- a scripted policy ------------------------------------------------------------------------------------------------------


@dataclass
class SickBackend(ScriptedBackend):
    """Functional tokens are weighed by ``likes`` and then raised to the power of ``sharp``: 0 uniform, above 1 more certain."""

    likes: dict[str, float] = field(default_factory=dict)
    sharp: float = 1.0

    def weights(self, context: Sequence[int], words: Sequence[str]) -> dict[str, float]:
        return super().weights(
            [len(context), *context[:6], *context[-3:]], words
        )  # to hash it all would take most of the time

    def boundary(self, context: Sequence[int], after: str) -> dict[str, float]:
        priors = self.weights(context, self.tokens.legal(after))
        raw = {tag: (p * self.likes.get(tag, 1.0)) ** self.sharp for tag, p in priors.items()}
        return {tag: p / sum(raw.values()) for tag, p in raw.items()}


class SickReward(Reward):
    """Right is what the source says, finished or not. Pays for that, ``each`` for a segment of a tag, ``anyway`` on the last one."""

    def __init__(self, each: dict[str, float], anyway: float) -> None:
        self.each, self.anyway = each, anyway

    def score(self, source: ProblemSource, rollouts: Sequence[Rollout]) -> list[Score]:
        found = []
        for rollout in rollouts:
            text = "".join(f"<{tag}>{text}</{tag}>" for tag, text in rollout.steps)
            verdict = source.judge(rollout.problem, text)
            rewards = [self.each.get(segment.tag, 0.0) for segment in rollout.segments]
            rewards[-1] += verdict.right + self.anyway
            found.append(Score(verdict, float(verdict.right), tuple(rewards)))
        return found


@dataclass
class Illness:
    """What is wrong at a step, at a severity in [0, 1]: settings of the policy, of the reward, and of what the trainer compares."""

    likes: dict[str, float] = field(default_factory=dict)
    sharp: float = 1.0
    stop: float = 0.25
    share: float = 0.4
    each: dict[str, float] = field(default_factory=dict)
    anyway: float = 0.0
    late: float = 0.0
    left: float = 0.05
    """Nats a token between policy and reference."""
    gap: float = 0.001
    """Nats a token between sampler and trainer."""


EXPANDER = TokenExpander(
    mode="tree",
    rollouts=6,
    children="drawn",
    width=3,
    sampling=Sampling(max_segment_tokens=60),
    max_depth=14,
    max_tokens=400,
)


@cache
def grown(step: int, seed: int, policy: str, problems: int = 8) -> list[Tree]:
    """Trees of a step, by what of an :class:`Illness` search depends on."""
    likes, sharp, stop, share, each, anyway = literal_eval(policy)
    backend, source = SickBackend(likes=likes, sharp=sharp, stop=stop), Guess(step * problems % 200, problems, share)
    trees = grow(source.problems(), EXPANDER, backend, SickReward(each, anyway), source, seed=1000 * seed + step)
    return [tree for _, tree in sorted(trees, key=lambda pair: pair[0])]


def step_metrics(step: int, seed: int, ill: Illness) -> dict[str, float]:
    """A step as the loop would log it: trees of a scripted policy, measured; log-probs of the trainer made from the sampler's."""
    policy = (ill.likes, ill.sharp, ill.stop, ill.share, ill.each, ill.anyway)
    trees = [copy(tree) for tree in grown(step, seed, repr(policy))]
    rng = random.Random(f"{seed} {step}")
    for tree in trees:
        tree.leaves = [(leaf, _late(score) if rng.random() < ill.late else score) for leaf, score in tree.leaves]
    rollouts = [rollout for tree in trees for rollout in tree.rollouts()]
    verdicts = [rollout.score.verdict.status for rollout in rollouts]
    judged = [rollout for rollout in rollouts if rollout.score.verdict.status is not Status.TIMED_OUT]
    sampled = torch.tensor([p for rollout in judged for s in rollout.segments for p in s.logprobs])
    trainer = sampled + ill.gap * torch.tensor([rng.choice((-1.0, 1.0)) for _ in sampled])
    reference = trainer - ill.left * torch.tensor([rng.expovariate(1) for _ in sampled])
    everywhere = torch.ones_like(sampled)
    learned = {
        "reward": sum(sum(r.score.rewards) for r in judged) / max(len(judged), 1),
        "kl": float((trainer - reference).mean()),
        "sampler_gap": float(sampler_gap(trainer, sampled, everywhere, lambda x: x)),
    }
    return {
        "step": step,
        **(learned if judged else {}),
        "accuracy": verdicts.count(Status.RIGHT) / len(rollouts),
        "rollouts": float(len(rollouts)),
        **measures.rates(measures.count(trees, EXPANDER.table, Guess(share=ill.share))),
        **{f"verdicts/{status}": float(verdicts.count(status)) for status in Status},
    }


def _late(score: Score) -> Score:
    return replace(score, verdict=Verdict(Status.TIMED_OUT))


def history(
    illness: Callable[[float], Illness], seed: int = 0, steps: int = 16, begin: int = 6
) -> list[dict[str, float]]:
    """Metrics of a run that is healthy until step ``begin`` and wholly ill two steps later."""
    severity = [min(max((step - begin) / 2, 0.0), 1.0) for step in range(steps)]
    return [step_metrics(step, seed, illness(s)) for step, s in enumerate(severity)]


def fade(severity: float, end: float, start: float = 1.0) -> float:
    """From ``start`` to ``end`` in equal factors."""
    return start * math.exp(severity * math.log(end / start))


ILL: dict[str, tuple[str, Callable[[float], Illness]]] = {  # what is done to the run -> (what must ring, how)
    "one token takes all": (
        "token_collapse",
        lambda s: Illness(likes={"next_step": fade(s, 1e6), "output": fade(s, 1e-6)}),
    ),
    "a token dies": ("token_collapse", lambda s: Illness(likes={"verify": 1.0 - s + 1e-9})),
    "choices are certain": ("token_collapse", lambda s: Illness(sharp=fade(s, 60.0))),
    "choices are uniform": ("token_collapse", lambda s: Illness(sharp=1.0 - s)),
    "the policy leaves its reference": ("kl_explosion", lambda s: Illness(left=fade(s, 2.0, 0.05))),
    "answers shrink": ("length_collapse", lambda s: Illness(stop=fade(s, 0.95, 0.15))),
    "answers grow": ("length_growth", lambda s: Illness(stop=fade(s, 0.08, 0.25))),
    "a PRM likes every check": ("prm_gaming", lambda s: Illness(likes={"verify": fade(s, 30.0)}, each={"verify": 0.3})),
    "wrong answers are paid": ("reward_without_accuracy", lambda s: Illness(anyway=0.6 * s)),
    "the sampler has other weights": ("sampler_mismatch", lambda s: Illness(gap=fade(s, 0.3, 0.001))),
    "problems are too hard": ("dead_groups", lambda s: Illness(share=0.4 * (1 - s) + 0.003)),
    "problems are too easy": ("dead_groups", lambda s: Illness(share=0.4 + 0.597 * s)),
    "the checker is overloaded": ("checker_timeouts", lambda s: Illness(late=0.3 * s)),
    "the checker hardly answers": ("checker_timeouts", lambda s: Illness(late=0.97 * s)),
    "the checker is down": ("checker_timeouts", lambda s: Illness(late=1.0 * s)),
}
