"""From trees of prompt-guided search to annotated trajectories: cross-verification and branch merging.

arXiv 2502.13389, section 3.2. Of the finished paths of a tree, the correct one with the best steps is kept plain. It is also
merged with a wrong path that shares a prefix with it: shared prefix, wrong branch, ``verify`` (the model itself says where
it went wrong), ``refine`` (back at the fork, the first correct step), the rest of the correct branch, ``output``. Several wrong
paths may be taken back so, one after the other, before the correct one.
"""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice

from rftt_lightning.core.contracts import (
    Backend,
    ProblemSource,
    Request,
    Rollout,
    Sampling,
    Status,
    Step,
    Trajectory,
    UserError,
)
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Tree
from rftt_lightning.search.expand import dialogue, read_prompts, seed_of

VERIFY, REFINE, OUTPUT = "verify", "refine", "output"


@dataclass
class Report:
    """What became of the trees. ``rejected`` counts reasons; every tree is in ``trees``, every trajectory in ``kept``."""

    trees: int = 0
    kept: Counter[str] = field(default_factory=Counter)
    rejected: Counter[str] = field(default_factory=Counter)
    tokens: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class Draft:
    """A trajectory that is being written: ``paths`` are the wrong ones that are taken back, if any, and then the correct one;
    ``steps`` go to the end of the path number ``at``, and ``right`` says of each whether it is the correct path's or a verify.
    ``ending`` asks for a verify before the output, too."""

    paths: tuple[Rollout, ...]
    steps: tuple[Step, ...]
    right: tuple[bool, ...]
    ending: bool
    at: int = 0

    @property
    def kind(self) -> str:
        return "merged" if len(self.paths) > 1 else "plain"

    @property
    def finished(self) -> bool:
        return self.at == len(self.paths) - 1


class Curator:
    """Settings of curation. Which path is best and which are worst say the mean step scores of the search's reward, which in the
    paper are a PRM's. Where it gives none the nodes' mean values stand in, which favour long paths among the correct ones and early
    forks among the wrong ones; for a PRM, search with ``ProcessReward`` and its ``value: outcome``.

    Args:
        prompts: folder with the functional prompts; ``verify.txt`` may contain ``{correct_steps}``.
        tokens: functional-token table; None is the paper's.
        alpha: smallest share of a wrong path, in steps, that it must have in common with the correct one (the paper's
            threshold, which it gives no value for). At 0 a wrong path may share the question alone, and the merged path goes
            back to the very beginning; anything above 0 asks for a shared step.
        merges: merged paths of a tree at most, each beginning with another wrong path, worst first (the paper: 1).
        repairs: wrong paths of a merged path at most, each taken back for the next one, the last for the correct one; how many,
            from 1 on, is drawn for each (the paper: 1).
        verify_share: share of the documents in which the model also verifies the correct end before the output.
        preparing: tags that prepare a step without taking one; refine begins at the first step after the fork that is none
            and that the wrong branch did not take as well (the paper: at the first one; with none here it is that).
        affirms, denies: regular expressions that tell what a verify text says; exactly one must be found.
        train_wrong_branch: False keeps the wrong steps in the context and out of the loss.
        sampling: how verify texts are drawn; max_tokens caps one, whatever the sampling says of segments.
        seed: of all draws.
    """

    def __init__(
        self,
        prompts: str = "pkg:search/prompts",
        tokens: str | None = None,
        alpha: float = 0.25,
        merges: int = 1,
        repairs: int = 1,
        verify_share: float = 0.0,
        preparing: Sequence[str] = ("clarify", "analyze", "subquestion"),
        affirms: str = r"(?i)verdict:\s*correct",
        denies: str = r"(?i)verdict:\s*wrong",
        train_wrong_branch: bool = True,
        sampling: Sampling = Sampling(temperature=0.7),
        max_tokens: int = 512,
        seed: int = 0,
    ) -> None:
        if not (0 <= alpha <= 1 and 0 <= verify_share <= 1):
            raise UserError(f"curation needs alpha and verify_share in 0..1; got {alpha} and {verify_share}")
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)
        for name in (VERIFY, REFINE, OUTPUT, *preparing):
            if name not in self.table.names:
                raise UserError(
                    f"curation needs the functional token {name!r}, the table has {', '.join(self.table.names)}"
                )
        self.prompts = read_prompts(prompts, self.table.names)
        if max_tokens < 1:
            raise UserError(f"curator.max_tokens is {max_tokens}; it must be at least 1")
        if merges < 0:
            raise UserError(f"curator.merges is {merges}; it must be 0 (plain paths only) or more")
        if repairs < 1:
            raise UserError(f"curator.repairs is {repairs}; it must be at least 1")
        self.alpha, self.merges, self.repairs, self.verify_share = alpha, merges, repairs, verify_share
        self.preparing = tuple(preparing)
        self.affirms, self.denies = _expression("affirms", affirms), _expression("denies", denies)
        self.sampling = replace(sampling, max_segment_tokens=max_tokens)
        self.train_wrong_branch, self.max_tokens, self.seed = train_wrong_branch, max_tokens, seed

    def curate(
        self, trees: Iterable[Tree], source: ProblemSource, backend: Backend, report: Report, chunk: int = 256
    ) -> Iterator[Trajectory]:
        """Trajectories in the order of the trees; ``report`` is filled on the way. Verify texts are asked for in batches."""
        stream = iter(trees)
        seen: set[tuple[str, tuple[Step, ...]]] = set()
        while batch := list(islice(stream, chunk)):
            report.trees += len(batch)
            drafts = [draft for tree in batch for draft in self.drafts(tree, source, report)]
            while not all(draft.finished for draft in drafts):
                drafts = self._verify(drafts, backend, report, ending=False)
            drafts = self._verify(drafts, backend, report, ending=True)
            for draft in drafts:
                trajectory = self._trajectory(draft, source)
                fault = self._fault(trajectory, seen)
                if fault:
                    report.rejected[f"{draft.kind}: {fault}"] += 1
                    continue
                seen.add((trajectory.problem.question, trajectory.steps))
                report.kept[trajectory.kind] += 1
                report.tokens.update(step.tag for step in trajectory.steps)
                yield trajectory

    # -- choosing --------------------------------------------------------------------------------------------------------

    def drafts(self, tree: Tree, source: ProblemSource, report: Report) -> list[Draft]:
        """The plain and the merged drafts of a tree, as far as it has them. A path whose answer is missing, or could not be
        judged, is neither correct nor known to be wrong. Phase 1 allows some sequences that the grammar does not; of these
        no document is made."""
        right, wrong = (self._ended(tree, status) for status in (Status.RIGHT, Status.WRONG))
        correct = [r for r in right if self._legal(r, OUTPUT)]
        if not correct:
            reason = "no correct path that the grammar allows" if right else "no correct path"
            report.rejected[f"tree: {reason}"] += 1
            return []
        best = max(correct, key=lambda r: mean_step_score(r, tree))
        rng = random.Random(seed_of(self.seed, tree.problem.id, "curate"))
        plain = self._draft((best,), rng)
        near = [r for r in wrong if self._legal(r, VERIFY) and common(r, best) / len(r.nodes) >= self.alpha]
        if not near:
            report.rejected["merged: no wrong path that shares enough"] += 1
            return [plain]
        ordered = sorted(near, key=lambda r: (mean_step_score(r, tree), -common(r, best)))
        worst = list({r.steps: r for r in ordered}.values())
        merged = []
        for first in range(min(self.merges, len(worst))):
            count = rng.randint(1, self.repairs) if self.repairs > 1 else 1
            merged.append(self._draft((*worst[first : first + count], best), rng))
        return [plain, *merged]

    def _draft(self, paths: tuple[Rollout, ...], rng: random.Random) -> Draft:
        shared = common(paths[0], paths[-1])
        right = tuple(i < shared for i in range(len(paths[0].steps)))
        return Draft(paths, paths[0].steps, right, rng.random() < self.verify_share)

    def _ended(self, tree: Tree, status: Status) -> list[Rollout]:
        return [r for r in tree.rollouts() if r.complete and r.score and r.score.verdict.status is status]

    def _legal(self, rollout: Rollout, following: str) -> bool:
        return self.table.is_legal([*(step.tag for step in rollout.steps), following])

    # -- cross-verification ----------------------------------------------------------------------------------------------

    def _verify(self, drafts: list[Draft], backend: Backend, report: Report, ending: bool) -> list[Draft]:
        """Ask for the verify texts of the wrong branches that the drafts have come to, or (``ending``) of the correct ends."""
        asked = [i for i, draft in enumerate(drafts) if (draft.ending if ending else not draft.finished)]
        requests = [self._request(drafts[i], backend, ending) for i in asked]
        answers = dict(zip(asked, backend.generate(requests), strict=True))
        kept = []
        for i, draft in enumerate(drafts):
            if i not in answers:
                kept.append(draft)
                continue
            segment = answers[i].segments[0]
            fault = "verify text broke off" if not segment.closed else self._contradiction(segment.text, right=ending)
            if not fault:
                kept.append(self._continue(draft, segment.text))
            else:
                report.rejected[f"{draft.kind}: {'final check' if ending else 'verify'}: {fault}"] += 1
                if ending:  # the document stands without the final check
                    kept.append(draft)
        return kept

    def _request(self, draft: Draft, backend: Backend, ending: bool) -> Request:
        *wrong, best = draft.paths
        shared = common(wrong[min(draft.at, len(wrong) - 1)], best) if wrong else 0
        correct = "\n".join(text for _, text in best.steps[shared:])
        prompts = {**self.prompts, VERIFY: self.prompts[VERIFY].replace("{correct_steps}", correct)}
        chat = dialogue(best.problem.question, draft.steps, prompts, ask=VERIFY)
        seed = seed_of(self.seed, best.problem.id, draft.kind, ending, *([draft.at] if draft.at and not ending else []))
        return Request(backend.chat(chat), seed, self.max_tokens, self.sampling, force=VERIFY)

    def _contradiction(self, text: str, right: bool) -> str:
        """Why a verify text does not agree with the known verdict; empty if it does."""
        says = bool(self.affirms.search(text)), bool(self.denies.search(text))
        if says == (right, not right):
            return ""
        return "contradicts the known verdict" if says == (not right, right) else "gives no clear verdict"

    def _continue(self, draft: Draft, text: str) -> Draft:
        """The draft with a verify text, and after a wrong path with the next one from the fork of the two on."""
        steps, right = (*draft.steps, Step(VERIFY, text)), (*draft.right, True)
        if draft.finished:
            return replace(draft, steps=steps, right=right)
        now, then = draft.paths[draft.at], draft.paths[draft.at + 1]
        fork, correct = common(now, then), common(then, draft.paths[-1])
        onward, taken = range(fork, len(then.steps)), now.steps[fork:]
        changes = (i for i in onward if then.steps[i].tag not in self.preparing and then.steps[i] not in taken)
        first = next(changes, onward[-1])
        steps += (Step(REFINE, then.steps[first].text), *then.steps[first + 1 :])
        right += tuple(i < correct for i in range(first, len(then.steps)))
        return replace(draft, steps=steps, right=right, at=draft.at + 1)

    # -- writing ---------------------------------------------------------------------------------------------------------

    def _trajectory(self, draft: Draft, source: ProblemSource) -> Trajectory:
        *wrong, best = draft.paths
        answer = best.score.verdict.answer or ""  # type: ignore[union-attr]
        steps = (*draft.steps, Step(OUTPUT, source.output(answer)))
        train = tuple(self.train_wrong_branch or right for right in (*draft.right, True))
        lineage = {"correct": list(best.nodes), "wrong": [list(path.nodes) for path in wrong]}
        return Trajectory(best.problem, steps, train, draft.kind, lineage)

    def _fault(self, trajectory: Trajectory, seen: set[tuple[str, tuple[Step, ...]]]) -> str:
        if not self.table.is_legal(step.tag for step in trajectory.steps):
            pairs = zip(("question", *(s.tag for s in trajectory.steps)), trajectory.steps, strict=False)
            before, step = next((b, s) for b, s in pairs if s.tag not in self.table.legal(b))
            return f"{step.tag} may not follow {before}"
        if any(tag in step.text for step in trajectory.steps for tag in self.table.tags):
            return "a functional tag inside a step's text"
        if (trajectory.problem.question, trajectory.steps) in seen:
            return "duplicate"
        return ""


def _expression(name: str, text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise UserError(f"curator.{name} is no regular expression ({error}): {text}") from error


def common(one: Rollout, other: Rollout) -> int:
    """Steps that two paths of one tree share."""
    pairs = zip(one.nodes, other.nodes, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one.nodes), len(other.nodes)))


def mean_step_score(rollout: Rollout, tree: Tree) -> float:
    """Mean of the reward's step scores; of the nodes' mean values where it gives none."""
    scores = [s for s in rollout.score.steps if s is not None] if rollout.score else []
    values = scores or [tree.values[node] / max(tree.visits[node], 1) for node in rollout.nodes]
    return sum(values) / len(values)
