import json
import time
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rftt_lightning.core.contracts import Status, UserError
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Tree
from rftt_lightning.search.driver import Limits, Progress, grow
from rftt_lightning.search.expand import ChainOfThought, PromptExpander, TokenExpander
from scripted import ScriptedBackend, ScriptedReward, ScriptedSource, shuffled

TABLE = TokenTable.from_yaml()


@pytest.fixture(scope="module", params=["legal", "drawn", "sample", "prompts", "cot"])
def expander(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("prompts")
    for name in (*TABLE.names, "cot"):
        (folder / f"{name}.txt").write_text(name)
    return {
        "legal": lambda: TokenExpander(rollouts=7),
        "drawn": lambda: TokenExpander(rollouts=7, children="drawn", width=3),
        "sample": lambda: TokenExpander(rollouts=7, mode="sample"),
        "prompts": lambda: PromptExpander(prompts=str(folder), rollouts=7),
        "cot": lambda: ChainOfThought(prompts=str(folder), rollouts=7),
    }[request.param]()


def grown(problems, expander, *, backend=None, reward=None, **settings) -> dict[str, Tree]:
    """Trees by problem id, each checked."""
    source = ScriptedSource()
    backend, reward = backend or ScriptedBackend(TABLE), reward or ScriptedReward(TABLE)
    found = {}
    for order, tree in grow(problems, expander, backend, reward, source, **settings):
        assert tree.problem is problems[order] and tree.problem.id not in found
        tree.check()
        found[tree.problem.id] = tree
    assert set(found) == {p.id for p in problems}
    return found


PROBLEMS = ScriptedSource(9).problems()


@pytest.mark.parametrize("parallel", [1, 3])
def test_concurrency_and_order_change_nothing(expander, parallel):
    alone = grown(PROBLEMS, expander, concurrency=1, parallel=parallel)
    for concurrency in (2, 5, 100):
        assert grown(PROBLEMS, expander, concurrency=concurrency, parallel=parallel) == alone
    assert grown(shuffled(PROBLEMS, 1), expander, concurrency=4, parallel=parallel) == alone
    assert grown(PROBLEMS[3:5], expander, parallel=parallel) == {p.id: alone[p.id] for p in PROBLEMS[3:5]}


def test_seeds_act(expander):
    one, two = (grown(PROBLEMS, expander, seed=seed) for seed in (0, 1))
    same = isinstance(expander, ChainOfThought)  # which is greedy here
    assert (one == two) == same


@pytest.mark.parametrize("parallel", [1, 2, 5])
def test_each_tree_gets_its_rollouts_or_is_spent(expander, parallel):
    for tree in grown(PROBLEMS, expander, parallel=parallel).values():
        assert len(tree.leaves) == 7 or (len(tree.leaves) < 7 and tree.spent[0])


@pytest.mark.parametrize("concurrency, parallel", [(1, 1), (4, 1), (4, 3), (100, 4)])
def test_batches_are_as_wide_as_allowed_and_rounds_never_share_a_node(expander, concurrency, parallel):
    """In one backend call there are at most ``parallel`` requests of a tree, all at different nodes."""
    rounds: list[list[tuple[str, int]]] = [[]]

    class SpyBackend(ScriptedBackend):
        def generate(self, requests):
            rounds.append([])
            return super().generate(requests)

    backend = SpyBackend(TABLE)

    class Spy:
        rollouts, c = expander.rollouts, expander.c
        plant, select, tell = expander.plant, expander.select, expander.tell

        def ask(self, tree, node, backend, seed):
            rounds[-1].append((tree.problem.id, node))
            return expander.ask(tree, node, backend, seed)

    grown(
        PROBLEMS,
        Spy(),
        backend=backend,
        concurrency=concurrency,
        parallel=parallel,
    )
    assert rounds.pop() == []
    assert [len(r) for r in rounds] == [len(batch) for batch in backend.batches]
    for asked in rounds:
        trees = Counter(problem for problem, _ in asked)
        assert 1 <= len(trees) <= concurrency and max(trees.values()) <= parallel
        planned = [pair for pair in asked if pair[1] != 0]
        assert len(set(planned)) == len(planned)


def test_a_finished_tree_is_replaced_at_once(expander):
    """As long as problems wait, the number of trees under way is ``concurrency``."""
    seen, backend = [], ScriptedBackend(TABLE)
    source = ScriptedSource(9)
    progress = Progress()
    for _ in grow(PROBLEMS, expander, backend, ScriptedReward(TABLE), source, concurrency=3, progress=progress):
        seen.append(progress.trees)
    begun = 3
    for batch in backend.batches:
        assert len(batch) <= 3
    full = [len(batch) for batch in backend.batches]
    assert full == sorted(full, reverse=True) and full[0] == begun
    assert progress.trees == 9 and seen[-1] == 9


def test_every_verdict_is_accounted_for(expander):
    progress, ticks, reward = Progress(), [], ScriptedReward(TABLE)
    backend = ScriptedBackend(TABLE)
    trees = grown(
        PROBLEMS,
        expander,
        backend=backend,
        reward=reward,
        progress=progress,
        parallel=2,
        tick=lambda p: ticks.append((p.rollouts, sum(p.verdicts.values()))),
    )
    found = Counter(score.verdict.status for tree in trees.values() for _, score in tree.leaves)
    assert progress.verdicts == found and progress.trees == 9
    assert progress.rollouts == sum(found.values()) == sum(reward.batches) == sum(len(t.leaves) for t in trees.values())
    assert all(rollouts == verdicts for rollouts, verdicts in ticks) and ticks[-1][0] == progress.rollouts
    assert progress.accuracy == found[Status.RIGHT] / progress.rollouts
    written = sum(len(s.tokens) for tree in trees.values() for s in tree.segments if s)
    assert progress.tokens == written and progress.computed >= written
    assert len(reward.batches) <= len(backend.batches)


@given(st.integers(1, 4), st.integers(1, 6), st.integers(0, 100))
def test_parallel_rollouts_end_and_stay_sound(parallel, rollouts, seed):
    """Narrow trees: more rollouts under way than there are free nodes at times."""
    expander = TokenExpander(rollouts=rollouts, children="drawn", width=2, max_depth=3)
    grown(PROBLEMS[:3], expander, parallel=parallel, seed=seed)


def test_trees_survive_the_way_to_disk(expander):
    for tree in grown(PROBLEMS, expander).values():
        assert Tree.from_json(json.loads(json.dumps(tree.to_json()))) == tree


@pytest.mark.parametrize("settings", [{"concurrency": 0}, {"parallel": 0}])
def test_nothing_at_a_time_is_refused(settings):
    with pytest.raises(UserError, match="must be at least 1"):
        grown(PROBLEMS, TokenExpander(), **settings)


def test_no_problems_no_trees():
    assert grown([], TokenExpander()) == {}


def test_progress_before_the_first_rollout():
    assert Progress().accuracy == 0.0 and Progress().seconds >= 0.0


class Narrow(ScriptedBackend):
    """Has room for ``rows`` requests, in the order in which it is given them."""

    def __init__(self, rows: int) -> None:
        super().__init__(TABLE)
        self.rows = rows

    def stream(self, more):
        given = 0
        while requests := list(more(self.rows)):
            assert len(requests) <= self.rows
            yield list(enumerate(self.generate(requests), given))
            given += len(requests)


def test_the_tree_that_is_furthest_behind_comes_first(expander):
    """With fewer rows than trees no tree gets two rollouts ahead of another, and they are the same trees as ever."""
    begun, problems = Counter(), {}

    class Spy:
        rollouts, c = expander.rollouts, expander.c
        plant, ask, tell = expander.plant, expander.ask, expander.tell

        def select(self, tree):
            node = expander.select(tree)
            if node is not None:
                begun[tree.problem.id] += 1
                problems[tree.problem.id] = tree
                counts = [begun[name] for name, t in problems.items() if t is tree or not t.spent[0]]
                assert max(counts) - min(counts) <= 2
            return node

    assert grown(PROBLEMS, Spy(), backend=Narrow(2)) == grown(PROBLEMS, expander)


def test_useful_tokens_are_each_question_once_and_what_was_written(expander):
    progress = Progress()
    trees = grown(PROBLEMS, expander, progress=progress).values()
    assert progress.useful == sum(len(tree.prompt) for tree in trees) + progress.tokens


def test_the_models_time_is_not_that_of_the_trees(expander):
    """What planting takes is not counted as the backend's."""

    class Slow:
        rollouts, c = expander.rollouts, expander.c
        select, ask, tell = expander.select, expander.ask, expander.tell

        def plant(self, problem, backend):
            time.sleep(0.02)
            return expander.plant(problem, backend)

    progress = Progress()
    grown(PROBLEMS, Slow(), progress=progress)
    assert progress.seconds - progress.generate_seconds >= 9 * 0.02


def test_an_expander_that_begins_nothing_loses_no_tree_silently():
    class Idle(TokenExpander):
        def select(self, tree):
            return None

    with pytest.raises(ValueError, match="Idle finds nothing to do"):
        grown(PROBLEMS, Idle())


@pytest.mark.parametrize("limits", [{"tokens": 0}, {"seconds": -1.0}])
def test_limits_that_allow_nothing_are_refused(limits):
    with pytest.raises(UserError, match="must be above 0"):
        Limits(**limits)
