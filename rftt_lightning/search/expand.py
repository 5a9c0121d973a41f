"""What a leaf asks of the backend, and what its answer means for the tree.

:class:`PromptExpander` (phase 1) steers an instruct model by one functional PROMPT per action, one segment a request.
:class:`TokenExpander` (phase 2 and inference) lets the policy choose functional TOKENS, one whole rollout a request.
Both hold settings only; all state is in the tree.
"""

from __future__ import annotations

import hashlib
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from operator import itemgetter
from pathlib import Path

from rftt_lightning.core.contracts import (
    QUESTION,
    Backend,
    Completion,
    Message,
    Problem,
    Provenance,
    Request,
    Sampling,
    Segment,
    UserError,
)
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Plan, Tree

COT = "cot"
"""Name of the prompt, and of the only segment, of a chain-of-thought answer."""

RULES = ("uct", "puct")
"""How :meth:`Tree.select` chooses among children."""

NEVER = r"(?!)"
"""A regular expression that nothing matches."""


def seed_of(*parts: object) -> int:
    """A 63-bit seed from any parts: stable between runs and machines, unlike ``hash``."""
    digest = hashlib.blake2b("\0".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


class Expander(ABC):
    """Settings of a search: how many rollouts a problem, how leaves grow, how tokens are drawn. ``rule`` is that of selection,
    ``c`` its exploration weight (:meth:`Tree.select`)."""

    rollouts: int
    sampling: Sampling
    c: float
    rule: str = "uct"

    def plant(self, problem: Problem, backend: Backend) -> Tree:
        """A tree with its root."""
        return Tree(problem, backend.chat([Message("user", problem.question)]))

    def select(self, tree: Tree) -> int | None:
        """Node at which the next rollout begins, None while there is none."""
        return tree.select(self.c, self.rule)

    @abstractmethod
    def ask(self, tree: Tree, node: int, backend: Backend, seed: int) -> Request:
        """What to ask of the backend at a node that :meth:`select` or :meth:`tell` named."""

    @abstractmethod
    def tell(self, tree: Tree, node: int, completion: Completion, seed: int) -> tuple[int, int | None]:
        """Record the answer. Returns the deepest node it reached, and the node at which the same rollout goes on (None: it
        has ended)."""


class TokenExpander(Expander):
    """Functional-token-guided search (arXiv 2502.13389, section 3.3).

    Args:
        tokens: functional-token table (YAML); None is the paper's. If its tags are text, rollouts are free text: mode must be
            sample, and of the sampling only temperature and top_p act.
        rollouts: rollouts a problem.
        sampling: how contents and, in simulation, functional tokens are drawn.
        children: ``"legal"``: one child for each legal functional token, in order of probability (the paper's rule);
            ``"drawn"``: ``width`` functional tokens drawn from the policy, each with content of its own, so that a
            token may have several contents and no choice is off-policy.
        width: most children of a node.
        mode: ``"tree"``, or ``"sample"``: independent rollouts from the root (the control arm).
        max_depth: segments of a path; max_tokens: response tokens of a path. A path that spends them is dead, value 0.
        c: exploration weight; rule: ``"uct"`` (the paper's, unvisited children first) or ``"puct"`` (priors weigh in).
    """

    def __init__(
        self,
        tokens: str | None = None,
        rollouts: int = 16,
        sampling: Sampling = Sampling(),
        children: str = "legal",
        width: int = 8,
        mode: str = "tree",
        max_depth: int = 18,
        max_tokens: int = 4096,
        c: float = 2.0,
        rule: str = "uct",
    ) -> None:
        _one_of("children", children, ("legal", "drawn"))
        _one_of("mode", mode, ("tree", "sample"))
        _one_of("rule", rule, RULES)
        _check(c, rollouts=rollouts, width=width, max_depth=max_depth, max_tokens=max_tokens)
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)
        if mode == "tree" and self.table.as_text:
            raise UserError(
                f"expander.mode is tree, but the tags of {tokens} are text, over which cannot be searched; set it to sample"
            )
        self.rollouts, self.sampling, self.children, self.width = rollouts, sampling, children, width
        self.mode, self.max_depth, self.max_tokens, self.c, self.rule = mode, max_depth, max_tokens, c, rule

    def select(self, tree: Tree) -> int | None:
        return 0 if self.mode == "sample" else super().select(tree)

    def ask(self, tree: Tree, node: int, backend: Backend, seed: int) -> Request:
        prompt = tree.tokens(node)
        depth, used = len(tree.path_segments(node)), len(prompt) - len(tree.prompt)
        return Request(
            prompt=prompt,
            seed=seed,
            max_tokens=self.max_tokens - used,
            sampling=self.sampling,
            after=tree.tag(tree.parent[node]) if node else QUESTION,
            force=tree.tag(node) if node else None,
            forced_as=tree.plans[node].chosen,
            segments=self.max_depth - depth,
        )

    def tell(self, tree: Tree, node: int, completion: Completion, seed: int) -> tuple[int, int | None]:
        rng = random.Random(seed)
        priors = completion.priors
        for index, segment in enumerate(completion.segments):
            if node == 0 or index:
                node = self._child(tree, node, segment, priors, rng)
            tree.fill(node, segment)
            priors = segment.priors
        last = completion.segments[-1]
        tree.end(node, complete=last.closed and self.table.terminal(last.tag))
        return node, None

    def _child(self, tree: Tree, node: int, taken: Segment, priors: Mapping[str, float], rng: random.Random) -> int:
        """Plan the children of ``node`` and return the one that the policy itself took."""
        chosen = Provenance(taken.provenance[0]) if taken.tokens else Provenance.SAMPLED  # free text may be empty
        first = Plan(taken.tag, priors[taken.tag], chosen)
        if self.mode == "sample":
            return tree.plan(node, [first])[0]
        if self.children == "legal":
            ranked = sorted(priors.items(), key=itemgetter(1), reverse=True)
            others = [Plan(tag, p) for tag, p in ranked if p >= self.sampling.min_prior and tag != taken.tag]
            rest = others[: self.width - 1]
        else:
            likely = {tag: p for tag, p in priors.items() if p >= self.sampling.min_prior}
            likely = likely or {
                max(priors, key=priors.__getitem__): 1.0
            }  # all are rare: the backend, too, keeps the best
            draws = rng.choices(list(likely), list(likely.values()), k=self.width - 1)
            if self.sampling.temperature == 0:  # a tag's second content would be the first again
                draws = [tag for tag in dict.fromkeys(draws) if tag != taken.tag]
            rest = [Plan(tag, priors[tag], Provenance.SAMPLED) for tag in draws]
        return tree.plan(node, [first, *rest])[0]


class PromptExpander(Expander):
    """Prompt-guided search (arXiv 2502.13389, section 3.2): a chat in which each user turn asks for one kind of step.

    Args:
        prompts: folder with one text file per functional token that search asks for, ``<name>.txt``.
        tokens: functional-token table (YAML) whose ``prompted`` part says who may follow whom; None is the paper's.
        rollouts: rollouts a problem.
        samples: children of a node per action, ``once`` lists the actions that get only one.
        final: regular expression; a step that may be followed by the output and whose text it finds has reached the answer and
            ends its path; null: only terminal actions end one (the paper's rule).
        sampling: how contents are drawn.
        max_depth: segments of a path; max_tokens: tokens of its contents. A path that spends them is dead, value 0.
        c: exploration weight; rule: ``"uct"`` (the paper's, unvisited children first) or ``"puct"`` (priors weigh in).
    """

    def __init__(
        self,
        prompts: str = "pkg:search/prompts",
        tokens: str | None = None,
        rollouts: int = 16,
        samples: int = 2,
        once: Sequence[str] = ("direct_answer",),
        final: str | None = r"\\boxed\{",
        sampling: Sampling = Sampling(temperature=0.7),
        max_depth: int = 15,
        max_tokens: int = 4096,
        c: float = 2.0,
        rule: str = "uct",
    ) -> None:
        _one_of("rule", rule, RULES)
        _check(c, rollouts=rollouts, samples=samples, max_depth=max_depth, max_tokens=max_tokens)
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)
        asked = {tag for row in self.table.prompted.values() for tag in row}
        for name in set(once) - asked:
            raise UserError(f"expander.once names {name!r}; prompted search asks for {', '.join(sorted(asked))}")
        try:
            self.final = re.compile(final or NEVER)
        except re.error as error:
            raise UserError(f"expander.final is no regular expression ({error}): {final}") from error
        self.prompts = read_prompts(prompts, sorted(asked))
        self.rollouts, self.samples, self.once, self.sampling = rollouts, samples, tuple(once), sampling
        self.max_depth, self.max_tokens, self.c, self.rule = max_depth, max_tokens, c, rule

    def plant(self, problem: Problem, backend: Backend) -> Tree:
        tree = super().plant(problem, backend)
        self._plan(tree, 0, random.Random(seed_of(problem.id, "root")))
        return tree

    def ask(self, tree: Tree, node: int, backend: Backend, seed: int) -> Request:
        before = tree.path_segments(node)
        used = sum(len(segment.tokens) for segment in before)
        chat = dialogue(tree.problem.question, [s.step for s in before], self.prompts, ask=tree.tag(node))
        return Request(backend.chat(chat), seed, self.max_tokens - used, self.sampling, force=tree.tag(node))

    def tell(self, tree: Tree, node: int, completion: Completion, seed: int) -> tuple[int, int | None]:
        segment = completion.segments[0]
        tree.fill(node, segment)
        path = tree.path_segments(node)
        terminal = not self.table.prompted.get(segment.tag) or self._final(segment)
        spent = len(path) >= self.max_depth or sum(len(s.tokens) for s in path) >= self.max_tokens
        if terminal or spent or not segment.closed:
            tree.end(node, complete=terminal and segment.closed)
            return node, None
        return node, self._plan(tree, node, random.Random(seed))[0]

    def _final(self, segment: Segment) -> bool:
        """Could an output follow that states the answer? A subquestion, say, may spell one without having come to it."""
        ends = any(map(self.table.terminal, self.table.legal(segment.tag)))
        return ends and bool(self.final.search(segment.text))

    def _plan(self, tree: Tree, node: int, rng: random.Random) -> list[int]:
        tags = self.table.prompted[tree.tag(node)]
        samples = (
            self.samples if self.sampling.temperature > 0 else 1
        )  # a second greedy sample would be the first again
        plans = [Plan(tag, 1 / len(tags)) for tag in tags for _ in range(1 if tag in self.once else samples)]
        rng.shuffle(plans)
        return tree.plan(node, plans)


class ChainOfThought(Expander):
    """No search and no functional tokens: ``rollouts`` independent answers to one prompt, ``<prompts>/cot.txt``.

    The baseline of a model that was never taught functional tokens; each answer is one segment named ``cot``, which may take all
    ``max_tokens``, whatever the sampling says of segments.
    """

    def __init__(
        self,
        prompts: str = "pkg:search/prompts",
        rollouts: int = 1,
        sampling: Sampling = Sampling(temperature=0.0),
        max_tokens: int = 4096,
    ) -> None:
        _check(rollouts=rollouts, max_tokens=max_tokens)
        self.prompts = read_prompts(prompts, [COT])
        self.sampling = replace(sampling, max_segment_tokens=max_tokens)
        self.rollouts, self.max_tokens, self.c = rollouts, max_tokens, 0.0

    def plant(self, problem: Problem, backend: Backend) -> Tree:
        return Tree(problem, backend.chat(dialogue(problem.question, [], self.prompts, ask=COT)))

    def select(self, tree: Tree) -> int | None:
        return 0

    def ask(self, tree: Tree, node: int, backend: Backend, seed: int) -> Request:
        return Request(tree.prompt, seed, self.max_tokens, self.sampling, force=COT)

    def tell(self, tree: Tree, node: int, completion: Completion, seed: int) -> tuple[int, int | None]:
        leaf = tree.plan(0, [Plan(COT, 1.0, Provenance.SAMPLED)])[0]
        tree.fill(leaf, completion.segments[0])
        tree.end(leaf, complete=completion.segments[0].closed)
        return leaf, None


def read_prompts(folder: str, names: Sequence[str]) -> dict[str, str]:
    """One prompt per name from ``<folder>/<name>.txt``. Raises :class:`UserError` naming the file that is missing."""
    prompts = {}
    for name in names:
        path = Path(resolve(folder)) / f"{name}.txt"
        try:
            prompts[name] = path.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(f"no prompt for {name!r}: cannot read {path} ({error.strerror}); write one") from error
    return prompts


def dialogue(question: str, steps: Sequence[tuple[str, str]], prompts: Mapping[str, str], ask: str) -> list[Message]:
    """The chat that asks for the next step: each functional prompt is a user turn, each step so far an assistant turn."""
    turns: list[Message] = []
    for tag, text in (*steps, (ask, None)):
        prompt = prompts[tag] if turns else f"{question}\n\n{prompts[tag]}"
        turns.append(Message("user", prompt))
        if text is not None:
            turns.append(Message("assistant", text))
    return turns


def _one_of(name: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"expander.{name} is {value!r}; use one of {', '.join(known)}")


def _check(c: float = 0.0, **counts: int) -> None:
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"expander.{name} is {value}; it must be at least 1")
    if c < 0:
        raise UserError(f"expander.c is {c}; it must be at least 0")
