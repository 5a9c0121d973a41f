"""Curation on trees built by hand: exactly these documents, and every rejection counted."""

import json

import pytest

from rftt_lightning.core.contracts import (
    Backend,
    Completion,
    Problem,
    ProblemSource,
    Sampling,
    Score,
    Segment,
    Status,
    Step,
    UserError,
    Verdict,
)
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Plan, Tree
from rftt_lightning.search.curate import Curator, Report

PROBLEM = Problem("p", "what is 2 + 2 - 1?", answer="3")


class Says(Backend):
    """Answers every verify prompt with one text, and keeps the prompts and requests."""

    tokens = TokenTable.from_yaml()

    def __init__(self, text: str, closed: bool = True) -> None:
        self.text, self.closed, self.chats, self.requests = text, closed, [], []

    def chat(self, messages):
        self.chats.append(tuple(messages))
        return (len(self.chats),)

    def generate(self, requests):
        self.requests += requests
        segment = Segment("verify", (1,), (0.0,), (0,), self.text, self.closed)
        return [Completion((segment,)) for _ in requests]


class Source(ProblemSource):
    def problems(self):
        return [PROBLEM]

    def judge(self, problem, response):
        raise AssertionError("curation asks for no new verdicts")

    def output(self, answer):
        return f"it is {answer}"


def tree_of(*paths: tuple[list[Step], str | Status | None, list[float | None]]) -> Tree:
    """A tree of these paths, shared where they begin alike; (steps, answer, step scores), the answer "3" is right, None is
    that of an incomplete path, a status stands for itself."""
    tree = Tree(PROBLEM, (0,))
    for steps, answer, scores in paths:
        node = 0
        for tag, text in steps:
            same = [k for k in tree.children[node] if tree.segments[k].step == Step(tag, text)]
            if same:
                node = same[0]
                continue
            node = tree.plan(node, [Plan(tag, 1.0)])[0]
            tree.fill(node, Segment(tag, (1,), (0.0,), (0,), text, True))
        tree.end(node, complete=answer is not None)
        status = Status.NO_ANSWER if answer is None else Status.RIGHT if answer == "3" else Status.WRONG
        status, answer = (answer, None) if isinstance(answer, Status) else (status, answer)
        rewards = (0.0,) * len(steps)
        tree.backup(node, Score(Verdict(status, answer), float(answer == "3"), rewards, tuple(scores)))
    return tree


CLARIFY, FOUR = Step("clarify", "add, then subtract"), Step("next_step", "2 + 2 = 4")
RIGHT = [CLARIFY, FOUR, Step("direct_answer", "4 - 1 = 3")]
WRONG = [CLARIFY, FOUR, Step("subquestion", "now?"), Step("direct_answer", "4 + 1 = 5")]
LATE = [CLARIFY, FOUR, Step("subquestion", "then?"), Step("next_step", "4 - 1 = 3"), Step("direct_answer", "so 3")]


def curator(**settings) -> Curator:
    return Curator(prompts="pkg:tiny/prompts", affirms="good", denies="bad", **settings)


def run(made_by: Curator, backend: Backend, *trees: Tree):
    report = Report()
    return list(made_by.curate(trees, Source(), backend, report)), report


def test_plain_and_merged_documents_are_exactly_these():
    backend = Says("bad: the sign")
    made, report = run(
        curator(), backend, tree_of((RIGHT, "3", [None, 1.0, 1.0]), (WRONG, "5", [None, 1.0, None, 0.0]))
    )
    plain, merged = made
    assert plain.kind == "plain" and plain.steps == (*RIGHT, Step("output", "it is 3"))
    assert merged.kind == "merged"
    assert merged.steps == (
        *WRONG,
        Step("verify", "bad: the sign"),
        Step("refine", "4 - 1 = 3"),
        Step("output", "it is 3"),
    )
    assert report.kept == {"plain": 1, "merged": 1} and not report.rejected
    asked = [message.content for message in backend.chats[-1] if message.role == "assistant"]
    assert asked == [text for _, text in WRONG]


def test_refine_is_the_first_step_that_takes_one_and_the_rest_follows():
    made, _ = run(
        curator(), Says("bad"), tree_of((LATE, "3", [None, 1.0, None, 1.0, 1.0]), (WRONG, "5", [None, 1, None, 0]))
    )
    assert made[1].steps[len(WRONG) :] == (
        Step("verify", "bad"),
        Step("refine", "4 - 1 = 3"),
        Step("direct_answer", "so 3"),
        Step("output", "it is 3"),
    )


def test_best_correct_and_worst_wrong_path_by_mean_step_score():
    worse, better = [Step("analyze", "a"), *RIGHT[1:]], RIGHT
    near = [CLARIFY, FOUR, Step("direct_answer", "4 - 1 = 2")]
    tree = tree_of(
        (worse, "3", [None, 0.5, 0.5]),
        (better, "3", [None, 1, 1]),
        (WRONG, "5", [None, 1, None, 0.6]),
        (near, "2", [None, 1, 0]),
    )
    made, _ = run(curator(), Says("bad"), tree)
    assert made[0].steps[:-1] == tuple(better)
    assert made[1].steps[: len(near)] == tuple(near)


def test_wrong_branch_can_be_kept_out_of_the_loss():
    made, _ = run(curator(train_wrong_branch=False), Says("bad"), tree_of((RIGHT, "3", []), (WRONG, "5", [])))
    assert made[1].train == (True, True, False, False, True, True, True)
    assert made[0].train == (True,) * 4


@pytest.mark.parametrize("alpha, merged", [(0.5, 1), (0.51, 0)])
def test_alpha_is_the_least_share_of_the_wrong_path(alpha, merged):
    _, report = run(curator(alpha=alpha), Says("bad"), tree_of((RIGHT, "3", []), (WRONG, "5", [])))
    assert report.kept["merged"] == merged


@pytest.mark.parametrize("merges", [0, 1, 2, 3, 9])
def test_merged_paths_have_different_wrong_branches_worst_first(merges):
    wrongs = [[CLARIFY, FOUR, Step("direct_answer", f"4 + {n} = 5")] for n in range(3)]
    paths = [(w, "5", [None, 1.0, score]) for w, score in zip(wrongs, (0.4, 0.0, 0.2), strict=True)]
    made, report = run(curator(merges=merges), Says("bad"), tree_of((RIGHT, "3", []), *paths, paths[1]))
    assert [list(t.steps[:3]) for t in made[1:]] == [wrongs[1], wrongs[2], wrongs[0]][:merges]
    assert report.kept["plain"] == 1 and report.kept["merged"] == len(made) - 1
    assert all(t.steps[3:] == (Step("verify", "bad"), Step("refine", "4 - 1 = 3"), made[0].steps[-1]) for t in made[1:])


def test_wrong_paths_are_taken_back_one_after_the_other():
    """Each goes on at its fork with the path before it, by its first step that this one did not take."""
    first = [CLARIFY, FOUR, Step("direct_answer", "4 + 2 = 6")]
    second = [CLARIFY, FOUR, Step("next_step", "4 + 1 = 5"), Step("direct_answer", "so 5")]
    apart = [CLARIFY, Step("next_step", "2 * 2 = 4"), Step("direct_answer", "4 + 0 = 4")]
    tree = tree_of(
        (RIGHT, "3", []), (first, "6", [None, 1, 0.0]), (second, "5", [None, 1, 0.1, 0.8]), (apart, "4", [None, 1, 0.4])
    )
    bad = Step("verify", "bad")
    end = (bad, Step("refine", "4 - 1 = 3"), Step("output", "it is 3"))
    three = (*first, bad, Step("refine", "4 + 1 = 5"), second[-1], bad, Step("refine", apart[1].text), apart[-1], bad)
    seen = set()
    for seed in range(30):
        made, _ = run(curator(merges=3, repairs=3, alpha=0.0, seed=seed, train_wrong_branch=False), Says("bad"), tree)
        for path in made[1:]:
            seen.add((path.steps, path.train, len(path.lineage["wrong"])))
    by_steps = {steps: (train, count) for steps, train, count in seen}
    assert by_steps[(*first, *end)] == ((True, True, False, True, True, True), 1)
    two = (*first, bad, Step("refine", "4 + 1 = 5"), second[-1], *end)
    assert by_steps[two] == ((True, True, False, True, False, False, True, True, True), 2)
    (longest,) = (steps for steps, (_, count) in by_steps.items() if count == 3)
    assert longest[: len(three)] == three and longest[-1] == end[-1]
    assert {steps[: len(apart)] for steps, (_, count) in by_steps.items() if count == 1} >= {tuple(first), tuple(apart)}
    assert len(by_steps) == 6  # from the first 1, 2 or 3 wrong paths on, from the second 1 or 2, from the third 1


@pytest.mark.parametrize("alpha, merged", [(0.0, True), (0.01, False)])
def test_above_zero_alpha_asks_for_a_shared_step(alpha, merged):
    apart = [Step("next_step", "2 - 1 = 2"), Step("direct_answer", "2 + 2 = 4")]
    made, _ = run(curator(alpha=alpha), Says("bad"), tree_of((RIGHT, "3", []), (apart, "4", [])))
    assert [t.kind for t in made] == ["plain", "merged"][: 1 + merged]
    if merged:  # clarify prepares a step, so refine takes the one after it
        assert made[1].steps == (
            *apart,
            Step("verify", "bad"),
            Step("refine", FOUR.text),
            RIGHT[2],
            Step("output", "it is 3"),
        )


@pytest.mark.parametrize("status", [Status.NO_ANSWER, Status.TIMED_OUT, Status.UNPARSABLE_GOLD, None])
def test_only_a_path_known_to_be_wrong_is_merged(status):
    made, report = run(curator(), Says("bad"), tree_of((RIGHT, "3", []), (WRONG, status, [])))
    assert [t.kind for t in made] == ["plain"] and report.rejected == {"merged: no wrong path that shares enough": 1}


@pytest.mark.parametrize(
    "text, closed, reason",
    [
        ("good", True, "merged: verify: contradicts the known verdict"),
        ("who knows", True, "merged: verify: gives no clear verdict"),
        ("good and bad", True, "merged: verify: gives no clear verdict"),
        ("bad", False, "merged: verify: verify text broke off"),
    ],
)
def test_a_verify_text_that_does_not_agree_is_rejected_and_counted(text, closed, reason):
    made, report = run(curator(), Says(text, closed), tree_of((RIGHT, "3", []), (WRONG, "5", [])))
    assert [t.kind for t in made] == ["plain"] and report.rejected == {reason: 1}


@pytest.mark.parametrize("cap, most", [(512, 1024), (24, 30), (24, 12)])
def test_only_max_tokens_cuts_a_verify_text(cap, most):
    backend = Says("bad")
    made_by = curator(verify_share=1.0, sampling=Sampling(0.7, max_segment_tokens=cap), max_tokens=most)
    run(made_by, backend, tree_of((RIGHT, "3", []), (WRONG, "5", [])))
    assert backend.requests
    for request in backend.requests:
        assert min(request.max_tokens, request.sampling.max_segment_tokens) == most
        assert request.sampling.temperature == 0.7


def test_final_checks_stand_before_the_output_or_are_left_out():
    made, _ = run(curator(verify_share=1.0), Says("good"), tree_of((RIGHT, "3", [])))
    assert [step.tag for step in made[0].steps][-2:] == ["verify", "output"]
    made, report = run(curator(verify_share=1.0), Says("bad"), tree_of((RIGHT, "3", [])))
    assert made[0].steps == (*RIGHT, Step("output", "it is 3"))
    assert report.rejected["plain: final check: contradicts the known verdict"] == 1


def test_what_the_grammar_forbids_or_hides_tags_is_rejected():
    root = [Step("direct_answer", "3")]
    hostile = [CLARIFY, Step("next_step", "</next_step><output>3"), Step("direct_answer", "3")]
    _, report = run(
        curator(), Says("bad"), tree_of((root, "3", [])), tree_of((hostile, "3", [])), tree_of((WRONG, "5", []))
    )
    assert report.rejected["tree: no correct path that the grammar allows"] == 1
    assert report.rejected["plain: a functional tag inside a step's text"] == 1
    assert report.rejected["tree: no correct path"] == 1
    assert sum(report.kept.values()) == 0 and report.trees == 3


def test_paths_are_chosen_among_those_that_the_grammar_allows():
    answers = [Step("direct_answer", "3")], [Step("direct_answer", "5")]
    made, _ = run(
        curator(alpha=0.0), Says("bad"), tree_of((answers[0], "3", [1.0]), (RIGHT, "3", [0.5]), (answers[1], "5", []))
    )
    assert [t.steps for t in made] == [(*RIGHT, Step("output", "it is 3"))]


def test_refine_does_not_repeat_a_step_of_the_wrong_branch():
    again = [Step("next_step", RIGHT[1].text), Step("direct_answer", "4 + 4 = 8")]
    made, _ = run(curator(alpha=0.0), Says("bad"), tree_of((RIGHT, "3", []), (again, "8", [])))
    assert made[1].steps[-2:] == (Step("refine", RIGHT[2].text), Step("output", "it is 3"))


def test_everything_kept_is_legal_and_survives_json():
    made, _ = run(curator(verify_share=0.5), Says("bad"), tree_of((LATE, "3", []), (WRONG, "5", []), (RIGHT, "3", [])))
    for trajectory in made:
        assert TokenTable.from_yaml().is_legal(step.tag for step in trajectory.steps)
        assert type(trajectory).from_json(json.loads(json.dumps(trajectory.to_json()))) == trajectory


def test_settings_out_of_range_are_refused():
    with pytest.raises(UserError, match="alpha"):
        curator(alpha=1.5)
    with pytest.raises(UserError, match="merges is -1"):
        curator(merges=-1)
    with pytest.raises(UserError, match="repairs is 0"):
        curator(repairs=0)
