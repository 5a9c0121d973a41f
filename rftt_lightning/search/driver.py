"""Many trees at once. A round: ask every tree -> ONE backend batch -> ONE reward batch -> tell every tree."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rftt_lightning.core.contracts import Backend, Completion, Problem, ProblemSource, Reward, Status, UserError
from rftt_lightning.core.tree import Tree
from rftt_lightning.search.expand import Expander, seed_of


@dataclass
class Progress:
    """Running totals of a search; ``seconds`` are wall time, ``tokens`` generated, ``computed`` gone through the model."""

    trees: int = 0
    rollouts: int = 0
    tokens: int = 0
    computed: int = 0
    generate_seconds: float = 0.0
    score_seconds: float = 0.0
    began: float = field(default_factory=time.monotonic)
    verdicts: Counter[Status] = field(default_factory=Counter)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def accuracy(self) -> float:
        """Share of right rollouts so far, 0 before the first."""
        return self.verdicts[Status.RIGHT] / max(self.rollouts, 1)


@dataclass(eq=False)
class _Growing:
    """A tree with rollouts under way: ``visits`` maps the rollout's number to the node it asks at."""

    order: int
    tree: Tree
    begun: int = 0
    visits: dict[int, int] = field(default_factory=dict)


def grow(
    problems: Sequence[Problem],
    expander: Expander,
    backend: Backend,
    reward: Reward,
    source: ProblemSource,
    *,
    seed: int = 0,
    concurrency: int = 128,
    parallel: int = 1,
    progress: Progress | None = None,
    tick: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[tuple[int, Tree]]:
    """Grow one tree per problem, yielding (index of the problem, tree) as trees finish.

    At most ``concurrency`` trees grow together, each with up to ``parallel`` rollouts under way (virtual loss keeps them
    apart); a finished tree makes room for the next problem at once. What is drawn depends on ``seed``, the problem's id and
    the rollout's number only. ``tick`` is called after every round.
    """
    for name, value in (("concurrency", concurrency), ("parallel", parallel)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    progress = Progress() if progress is None else progress
    waiting = deque(enumerate(problems))
    growing: list[_Growing] = []
    while waiting or growing:
        while waiting and len(growing) < concurrency:
            order, problem = waiting.popleft()
            growing.append(_Growing(order, expander.plant(problem, backend)))
        for item in growing:
            _begin(item, expander, parallel)
        ended = _round(growing, expander, backend, seed, progress)
        if ended:
            _score(ended, reward, source, progress)
        finished = [
            g for g in growing if not g.visits and (g.begun >= expander.rollouts or expander.select(g.tree) is None)
        ]
        growing = [g for g in growing if g not in finished]
        progress.trees += len(finished)
        tick(progress)
        for item in finished:
            yield item.order, item.tree


def _begin(item: _Growing, expander: Expander, parallel: int) -> None:
    """Begin rollouts until the tree has ``parallel`` under way, is out of rollouts, or has nothing free."""
    while len(item.visits) < parallel and item.begun < expander.rollouts:
        node = expander.select(item.tree)
        if node is None:
            return
        item.tree.hold(node)
        item.visits[item.begun] = node
        item.begun += 1


def _round(
    growing: Sequence[_Growing], expander: Expander, backend: Backend, seed: int, progress: Progress
) -> list[tuple[Tree, int]]:
    """One backend batch for all rollouts under way; returns (tree, leaf) of those that ended."""
    asked, requests, seeds = [], [], []
    for item in growing:
        for number, node in item.visits.items():
            depth = len(item.tree.path_segments(node))
            seeds.append(seed_of(seed, item.tree.problem.id, number, depth))
            asked.append((item, number, node))
            requests.append(expander.ask(item.tree, node, backend, seeds[-1]))
    began = time.monotonic()
    completions = backend.generate(requests)
    progress.generate_seconds += time.monotonic() - began
    ended = []
    for (item, number, node), completion, drawn in zip(asked, completions, seeds, strict=True):
        _count(completion, progress)
        leaf, onward = expander.tell(item.tree, node, completion, drawn)
        item.tree.hold(node, -1)
        if onward is None:
            del item.visits[number]
            ended.append((item.tree, leaf))
        else:
            item.tree.hold(onward)
            item.visits[number] = onward
    return ended


def _score(ended: Sequence[tuple[Tree, int]], reward: Reward, source: ProblemSource, progress: Progress) -> None:
    began = time.monotonic()
    scores = reward.score(source, [tree.rollout(leaf) for tree, leaf in ended])
    progress.score_seconds += time.monotonic() - began
    for (tree, leaf), score in zip(ended, scores, strict=True):
        tree.backup(leaf, score)
        progress.rollouts += 1
        progress.verdicts[score.verdict.status] += 1


def _count(completion: Completion, progress: Progress) -> None:
    progress.tokens += sum(len(segment.tokens) for segment in completion.segments)
    progress.computed += completion.computed
