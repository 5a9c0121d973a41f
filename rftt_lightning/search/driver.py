"""Many trees at once: ask every tree that is ready -> the backend's batch -> ONE reward batch -> tell them, ask again.

Every tree goes by rounds of its own: all its rollouts under way ask together, and it goes on when the last of them has its
answer. So a tree does not depend on what grows beside it, and the backend's batch never waits for the slowest tree. Where
there are more requests than rows, the tree that is furthest behind comes first, so that all end at about the same time.
"""

from __future__ import annotations

import heapq
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

from rftt_lightning.core.contracts import (
    Backend,
    Completion,
    Problem,
    ProblemSource,
    Request,
    Reward,
    Status,
    UserError,
)
from rftt_lightning.core.tree import Tree
from rftt_lightning.search.expand import Expander, seed_of


@dataclass
class Progress:
    """Running totals of a search; ``seconds`` are wall time, ``tokens`` generated, ``computed`` gone through the model,
    ``useful`` those that trees consist of: each question once, and what was generated (the prompts of phase 1's actions are not
    in it)."""

    trees: int = 0
    rollouts: int = 0
    tokens: int = 0
    computed: int = 0
    useful: int = 0
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


@dataclass(frozen=True)
class Limits:
    """When a tree begins no further rollout, though it has not made all of them: ``tokens`` were generated in it, or
    ``seconds`` have gone since it was planted (such a tree is not repeatable). None is no limit."""

    tokens: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("tokens", "seconds"):
            if (value := getattr(self, name)) is not None and value <= 0:
                raise UserError(f"limits.{name} is {value}; it must be above 0, or null for no limit")


@dataclass(eq=False)
class _Growing:
    """A tree with rollouts under way: ``visits`` maps the rollout's number to the node it asks at, ``answers`` to what came."""

    order: int
    tree: Tree
    begun: int = 0
    tokens: int = 0
    planted: float = field(default_factory=time.monotonic)
    visits: dict[int, int] = field(default_factory=dict)
    answers: dict[int, Completion] = field(default_factory=dict)


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
    limits: Limits = Limits(),
    progress: Progress | None = None,
    tick: Callable[[Progress], None] = lambda progress: None,
) -> Iterator[tuple[int, Tree]]:
    """Grow one tree per problem, yielding (index of the problem, tree) as trees finish.

    At most ``concurrency`` trees grow together, each with up to ``parallel`` rollouts under way (virtual loss keeps them
    apart); a finished tree makes room for the next problem at once. What is drawn depends on ``seed``, the problem's id and
    the rollout's number only. ``tick`` is called whenever trees were told.
    """
    for name, value in (("concurrency", concurrency), ("parallel", parallel)):
        if value < 1:
            raise UserError(f"{name} is {value}; it must be at least 1")
    progress = Progress() if progress is None else progress
    driver = _Driver(problems, expander, backend, seed, concurrency, parallel, limits, progress)
    began = time.monotonic()
    for ready in backend.stream(driver.more):
        progress.generate_seconds += time.monotonic() - began
        ended = driver.tell(ready)
        if ended:
            _score(ended, reward, source, progress)
        finished = driver.begin()
        tick(progress)
        for item in finished:
            yield item.order, item.tree
        began = time.monotonic()


class _Driver:
    """The trees that grow, and what they ask."""

    def __init__(
        self,
        problems: Sequence[Problem],
        expander: Expander,
        backend: Backend,
        seed: int,
        concurrency: int,
        parallel: int,
        limits: Limits,
        progress: Progress,
    ) -> None:
        self.waiting = deque(enumerate(problems))
        self.expander, self.backend, self.seed, self.progress = expander, backend, seed, progress
        self.concurrency, self.parallel, self.limits = concurrency, parallel, limits
        self.growing = 0
        self.told: list[_Growing] = []  # those whose next round is to begin
        self.asked: dict[int, tuple[_Growing, int]] = {}  # tree and rollout by number of the request
        self.queue: list[tuple[int, int, _Growing, int, Request]] = []  # a heap: rollouts begun, then order of arrival
        self.queued = 0
        self.given = 0

    def more(self, room: int) -> list[Request]:
        """At most ``room`` requests that the backend has not seen; problems that wait begin where there is room."""
        began = time.monotonic()
        while self.waiting and self.growing < self.concurrency:
            order, problem = self.waiting.popleft()
            tree = self.expander.plant(problem, self.backend)
            self.growing += 1
            self.progress.useful += len(tree.prompt)
            if not self._ask(_Growing(order, tree)):
                raise ValueError(f"{type(self.expander).__name__} finds nothing to do in a new tree")
        fresh: list[Request] = []
        while self.queue and len(fresh) < room:
            _, _, item, rollout, request = heapq.heappop(self.queue)
            self.asked[self.given] = item, rollout
            self.given += 1
            fresh.append(request)
        self.progress.generate_seconds -= time.monotonic() - began  # the backend's clock goes on meanwhile
        return fresh

    def tell(self, ready: Sequence[tuple[int, Completion]]) -> list[tuple[Tree, int]]:
        """Take in answers; returns (tree, leaf) of the rollouts that ended."""
        for number, completion in ready:
            item, rollout = self.asked.pop(number)
            item.answers[rollout] = completion
            if len(item.answers) == len(item.visits):
                self.told.append(item)
        return [(item.tree, leaf) for item in self.told for leaf in self._tell(item)]

    def _tell(self, item: _Growing) -> Iterator[int]:
        """Record a round's answers; yields the leaves of the rollouts that ended."""
        for rollout, node in list(item.visits.items()):
            completion = item.answers.pop(rollout)
            self._count(item, completion)
            leaf, onward = self.expander.tell(item.tree, node, completion, self._seed(item, rollout, node))
            item.tree.hold(node, -1)
            if onward is None:
                del item.visits[rollout]
                yield leaf
            else:
                item.tree.hold(onward)
                item.visits[rollout] = onward

    def _count(self, item: _Growing, completion: Completion) -> None:
        written = sum(len(segment.tokens) for segment in completion.segments)
        item.tokens += written
        self.progress.tokens += written
        self.progress.useful += written
        self.progress.computed += completion.computed

    def begin(self) -> list[_Growing]:
        """Begin the next round of the trees that were told; returns those that have none, which are finished."""
        finished = [item for item in self.told if not self._ask(item)]
        self.told = []
        self.growing -= len(finished)
        self.progress.trees += len(finished)
        return finished

    def _ask(self, item: _Growing) -> bool:
        """Begin rollouts until ``parallel`` are under way, none is left, or nothing is free, and ask for all of them."""
        while len(item.visits) < self.parallel and item.begun < self.expander.rollouts and not self._spent(item):
            node = self.expander.select(item.tree)
            if node is None:
                break
            item.tree.hold(node)
            item.visits[item.begun] = node
            item.begun += 1
        for rollout, node in item.visits.items():
            request = self.expander.ask(item.tree, node, self.backend, self._seed(item, rollout, node))
            heapq.heappush(self.queue, (item.begun, self.queued, item, rollout, request))
            self.queued += 1
        return bool(item.visits)

    def _spent(self, item: _Growing) -> bool:
        if not item.begun:
            return False
        tokens, seconds = self.limits.tokens, self.limits.seconds
        return (tokens is not None and item.tokens >= tokens) or (
            seconds is not None and time.monotonic() - item.planted >= seconds
        )

    def _seed(self, item: _Growing, rollout: int, node: int) -> int:
        return seed_of(self.seed, item.tree.problem.id, rollout, len(item.tree.path_segments(node)))


def _score(ended: Sequence[tuple[Tree, int]], reward: Reward, source: ProblemSource, progress: Progress) -> None:
    began = time.monotonic()
    scores = reward.score(source, [tree.rollout(leaf) for tree, leaf in ended])
    progress.score_seconds += time.monotonic() - began
    for (tree, leaf), score in zip(ended, scores, strict=True):
        tree.backup(leaf, score)
        progress.rollouts += 1
        progress.verdicts[score.verdict.status] += 1
