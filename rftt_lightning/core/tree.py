"""The search tree of one problem, as parallel arrays. It knows tags as opaque words and tokens as numbers.

A node is one functional segment; node 0 is the question. A node is *planned* (tag and prior known, no segment yet) until a
rollout visits it. Three verbs move it: :meth:`Tree.select` says where the next rollout begins, :meth:`Tree.fill` and
:meth:`Tree.plan` record what the backend wrote there, :meth:`Tree.backup` gives the finished path its worth.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, NamedTuple

from rftt_lightning.core.contracts import QUESTION, Problem, Provenance, Rollout, Score, Segment, Status, Verdict


class Plan(NamedTuple):
    """A child that search may visit: its tag, the policy's probability of it, and who would be choosing it."""

    tag: str
    prior: float
    chosen: Provenance = Provenance.UCT


@dataclass
class Tree:
    """``tree = Tree(problem, prompt)``; all lists are indexed by node number.

    ``visits`` N and ``values`` W = sum of backed-up values in [0, 1] give Q = W / N. ``ends`` holds None for a node that may
    be continued, True for a complete leaf (terminal segment, closed), False for a dead one (a budget was spent, or the
    segment broke off). ``held`` counts rollouts under way (virtual loss: visits of value 0). ``spent`` marks subtrees in
    which nothing is left to visit. ``leaves`` lists (leaf, score) in the order in which the rollouts ended.
    """

    problem: Problem
    prompt: tuple[int, ...]
    parent: list[int] = field(default_factory=lambda: [-1])
    children: list[list[int]] = field(default_factory=lambda: [[]])
    plans: list[Plan] = field(default_factory=lambda: [Plan(QUESTION, 1.0)])
    segments: list[Segment | None] = field(default_factory=lambda: [None])
    visits: list[int] = field(default_factory=lambda: [0])
    values: list[float] = field(default_factory=lambda: [0.0])
    ends: list[bool | None] = field(default_factory=lambda: [None])
    held: list[int] = field(default_factory=lambda: [0])
    spent: list[bool] = field(default_factory=lambda: [False])
    leaves: list[tuple[int, Score]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.parent)

    # -- where to go ---------------------------------------------------------------------------------------------------

    def uct(self, siblings: Sequence[int], c: float) -> list[float]:
        """W/N + c sqrt(ln N(parent) / N(child)), rollouts under way counted as visits of value 0 (arXiv 2502.13389, eq. 2)."""
        parent = self.parent[siblings[0]]
        log = math.log(self.visits[parent] + self.held[parent])
        counts = [self.visits[k] + self.held[k] for k in siblings]
        return [self.values[k] / n + c * math.sqrt(log / n) for k, n in zip(siblings, counts, strict=True)]

    def puct(self, siblings: Sequence[int], c: float) -> list[float]:
        """W/N + c P sqrt(N(parent)) / (1 + N(child)), P the prior (arXiv 1712.01815, with constant c); W/N of a child that was
        never visited is 0."""
        parent = self.parent[siblings[0]]
        root = math.sqrt(self.visits[parent] + self.held[parent])
        counts = [self.visits[k] + self.held[k] for k in siblings]
        return [
            self.values[k] / max(n, 1) + c * self.plans[k].prior * root / (1 + n)
            for k, n in zip(siblings, counts, strict=True)
        ]

    def select(self, c: float, rule: str = "uct") -> int | None:
        """The node at which the next rollout begins.

        ``"uct"``: planned children first, in their order of preference, else the child of the highest :meth:`uct`, down to
        a node that has no segment yet. ``"puct"``: planned and visited children compete by :meth:`puct`. Where all below
        the best child is held by rollouts under way, the next best is tried; None while nothing is free.
        """
        segments, held, spent = self.segments, self.held, self.spent
        if not self.children[0]:
            return None if held[0] else 0
        stack = [0]  # where to look, the best last
        while stack:
            node = stack.pop()
            if node and segments[node] is None:
                return node
            free = [k for k in self.children[node] if not (held[k] if segments[k] is None else spent[k])]
            if rule == "uct":
                fresh = next((k for k in free if segments[k] is None), None)
                if fresh is not None:
                    return fresh
            if len(free) > 1:
                worth = self.uct(free, c) if rule == "uct" else self.puct(free, c)
                free = [k for _, k in sorted(zip(worth, free, strict=True), key=itemgetter(0), reverse=True)]
            stack += reversed(free)
        return None

    def hold(self, node: int, by: int = 1) -> None:
        """Count a rollout under way on the path to ``node`` (``by=-1`` releases it)."""
        for k in (*self.path(node), 0):
            self.held[k] += by

    # -- what was found ------------------------------------------------------------------------------------------------

    def plan(self, node: int, plans: Iterable[Plan]) -> list[int]:
        """Add children without segments below ``node``, in order of preference; returns their numbers."""
        plans = list(plans)
        count = len(plans)
        added = list(range(len(self.parent), len(self.parent) + count))
        self.children[node] += added
        self.parent += [node] * count
        self.children += [[] for _ in plans]
        self.plans += plans
        self.segments += [None] * count
        self.visits += [0] * count
        self.values += [0.0] * count
        self.ends += [None] * count
        self.held += [0] * count
        self.spent += [False] * count
        return added

    def fill(self, node: int, segment: Segment) -> None:
        """Record what was written at a planned node."""
        if node == 0 or self.segments[node] is not None or segment.tag != self.plans[node].tag:
            raise ValueError(f"node {node} ({self.plans[node].tag}) cannot take a segment {segment.tag!r}")
        self.segments[node] = segment

    def end(self, node: int, complete: bool) -> None:
        """Declare a node a leaf: complete, or dead."""
        self.ends[node] = complete

    def backup(self, leaf: int, score: Score) -> None:
        """Add a finished rollout's value along its path."""
        self.leaves.append((leaf, score))
        for node in (*reversed(self.path(leaf)), 0):
            self.visits[node] += 1
            self.values[node] += score.value
            self.spent[node] = self._spent(node)

    def _spent(self, node: int) -> bool:
        kids = self.children[node]
        return self.ends[node] is not None or bool(kids) and all(self.spent[k] for k in kids)

    # -- reading -------------------------------------------------------------------------------------------------------

    def tag(self, node: int) -> str:
        return self.plans[node].tag

    def path(self, node: int) -> list[int]:
        """Node numbers from below the root down to ``node``; empty for the root."""
        path: list[int] = []
        while node > 0:
            path.append(node)
            node = self.parent[node]
        return path[::-1]

    def path_segments(self, node: int) -> list[Segment]:
        """The segments of the visited nodes on the path to ``node``."""
        return [s for k in self.path(node) if (s := self.segments[k]) is not None]

    def tokens(self, node: int) -> tuple[int, ...]:
        """Prompt and segments down to ``node``: exactly what the model saw (functional tokens only, not prompts)."""
        return self.prompt + tuple(t for segment in self.path_segments(node) for t in segment.tokens)

    def rollout(self, leaf: int, score: Score | None = None) -> Rollout:
        path = tuple(self.path(leaf))
        return Rollout(self.problem, self.prompt, tuple(self.path_segments(leaf)), bool(self.ends[leaf]), path, score)

    def rollouts(self) -> list[Rollout]:
        """Scored rollouts in the order in which they ended."""
        return [self.rollout(leaf, score) for leaf, score in self.leaves]

    def check(self) -> None:
        """Raise ValueError naming the node at which an invariant of a tree at rest is broken."""
        ended = [0] * len(self)
        worth = [0.0] * len(self)
        for leaf, score in self.leaves:
            ended[leaf] += 1
            worth[leaf] += score.value
        for k in range(len(self)):
            kids, segment = self.children[k], self.segments[k]
            total = worth[k] + sum(self.values[i] for i in kids)
            rules = {
                "a child is younger than its parent": all(kid > k and self.parent[kid] == k for kid in kids),
                "its parent lists it once": k == 0 or self.children[self.parent[k]].count(k) == 1,
                "N = rollouts ended here + N of children": self.visits[k]
                == ended[k] + sum(self.visits[i] for i in kids),
                "W = values ended here + W of children": math.isclose(self.values[k], total, abs_tol=1e-9),
                "0 <= W <= N": -1e-9 <= self.values[k] <= self.visits[k] + 1e-9,
                "visited nodes have segments": k == 0 or (self.visits[k] > 0) == (segment is not None),
                "a segment has the tag that was planned": segment is None or segment.tag == self.tag(k),
                "a leaf has no children": self.ends[k] is None or not kids,
                "one rollout ends at a leaf, none elsewhere": ended[k] == (self.ends[k] is not None),
                "spent: a leaf, or all children spent": self.spent[k] == self._spent(k),
                "nothing is under way": self.held[k] == 0,
            }
            for rule, holds in rules.items():
                if not holds:
                    raise ValueError(f"tree of {self.problem.id}, node {k} ({self.tag(k)}): broken: {rule}")

    def render(self, width: int = 60) -> str:
        """The visited tree as text, one node a line: tag, N, Q, beginning of the content, verdict at leaves."""
        verdicts = {leaf: score.verdict.status.value for leaf, score in self.leaves}
        lines = [f"{self.problem.id}: {self.problem.question}"]
        for node, indent in self._walk():
            segment = self.segments[node]
            text = " ".join(segment.text.split()) if segment else ""
            mean = self.values[node] / max(self.visits[node], 1)
            end = f"  [{verdicts[node]}]" if node in verdicts else ""
            lines.append(f"{indent}{self.tag(node)} N={self.visits[node]} Q={mean:.2f}  {text[:width]}{end}")
        return "\n".join(lines)

    def _walk(self) -> Iterator[tuple[int, str]]:
        stack = [(k, "") for k in reversed(self.children[0])]
        while stack:
            node, indent = stack.pop()
            if self.segments[node] is None:
                continue
            last = not any(self.segments[k] for k in self.children[self.parent[node]] if k > node)
            yield node, indent + ("└─ " if last else "├─ ")
            below = indent + ("   " if last else "│  ")
            stack.extend((k, below) for k in reversed(self.children[node]))

    # -- JSON ----------------------------------------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """JSON types only, a column for each attribute of nodes, plans and segments; :meth:`from_json` gives an equal tree
        back. The columns are the tree's own lists: write them out before it grows on. ``children`` follow from ``parent``."""
        written = [(node, segment) for node, segment in enumerate(self.segments) if segment is not None]
        columns = {name: [getattr(segment, name) for _, segment in written] for name in WRITTEN}
        return {
            "problem": vars(self.problem),
            "prompt": self.prompt,
            **{name: [getattr(plan, name) for plan in self.plans] for name in Plan._fields},
            **{name: getattr(self, name) for name in COLUMNS},
            "segments": {"node": [node for node, _ in written], **columns},
            "leaves": [(leaf, {**vars(score), "verdict": vars(score.verdict)}) for leaf, score in self.leaves],
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Tree:
        tree = cls(
            problem=Problem(**data["problem"]),
            prompt=tuple(data["prompt"]),
            plans=[
                Plan(*plan) for plan in zip(data["tag"], data["prior"], map(Provenance, data["chosen"]), strict=True)
            ],
            leaves=[(leaf, _score(score)) for leaf, score in data["leaves"]],
            **{name: list(data[name]) for name in COLUMNS},
        )
        tree.children = [[] for _ in tree.parent]
        for node, parent in enumerate(tree.parent[1:], 1):
            tree.children[parent].append(node)
        tree.segments = [None] * len(tree)
        rows = zip(data["segments"]["node"], *(data["segments"][name] for name in WRITTEN), strict=True)
        for node, tokens, logprobs, provenance, *others in rows:
            tree.segments[node] = Segment(tree.tag(node), tuple(tokens), tuple(logprobs), tuple(provenance), *others)
        return tree


COLUMNS = ("parent", "visits", "values", "ends", "held", "spent")
"""Lists of a tree that are written as they are."""

WRITTEN = tuple(field.name for field in dataclasses.fields(Segment) if field.name != "tag")
"""What is written of a segment: all but its tag, which is that of its plan."""


def _score(data: Mapping[str, Any]) -> Score:
    verdict = data["verdict"]
    forms = verdict["forms"] and tuple(verdict["forms"])
    verdict = Verdict(**{**verdict, "status": Status(verdict["status"]), "forms": forms})
    return Score(verdict, data["value"], tuple(data["rewards"]), tuple(data["steps"]))
