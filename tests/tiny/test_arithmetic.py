"""The arithmetic world: exact values, columns that are always right, slips as often as promised, an exact step checker."""

import ast
import operator
import random
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rftt_lightning.core.contracts import Problem, Status, Step, UserError
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.search.problems import check_overlap
from rftt_lightning.tiny.arithmetic import (
    Arithmetic,
    Operation,
    chain_of_thought,
    document,
    next_operation,
    spell,
    value_of,
)
from rftt_lightning.tiny.world import compute

TABLE = TokenTable.from_yaml()
SIGNS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul}
PROBLEM = Problem("p", "1 8 + 7 * 3", "3 9", data={"expression": ["18", "+", "7", "*", "3"]})


def oracle(expression: str) -> int:
    """Python's own parser decides what binds tighter."""

    def value(node: ast.expr) -> int:
        if isinstance(node, ast.BinOp):
            return SIGNS[type(node.op)](value(node.left), value(node.right))
        return node.value

    return value(ast.parse(expression, mode="eval").body)


def number(text: str) -> int:
    return int(text.replace(" ", ""))


def test_answers_are_those_of_an_independent_evaluator():
    for problem in Arithmetic("test", count=300).problems():
        assert number(problem.answer) == oracle(problem.question.replace(" ", ""))
        assert sum(token in "+-*" for token in problem.data["expression"]) == int(problem.level)


def test_splits_are_disjoint_and_harder_problems_can_be_asked_for():
    train, *held_out = (Arithmetic(split, 1500).problems() for split in ("train", "validation", "test"))
    assert not check_overlap(train, held_out[0] + held_out[1]) and not check_overlap(*held_out)
    assert {p.level for p in Arithmetic("test", count=20, fewest=6, most=6).problems()} == {"6"}


def test_columns_are_right_for_every_operation():
    for a in range(100):
        for b in range(100):
            for sign in "+-*":
                if not 0 <= compute(a, sign, b) <= 99:
                    continue
                operation = Operation(a, sign, b)
                columns = [c.split(" = ") for c in operation.columns.partition(" : ")[2].split(" , ")]
                values = [number(value) for _, value in columns]
                assert [oracle(re.sub(r"(?<=\d) (?=\d)", "", work)) for work, _ in columns] == values
                digits = values[0] if len(values) == 1 else values[0] % 10 + 10 * values[1]
                assert digits == operation.value
                assert operation.carry == 0 or 0 <= operation.forgetful <= 99


def test_documents_slip_only_where_a_carry_is_and_checks_never_do():
    source, rng = Arithmetic("train", count=400), random.Random(0)
    slips = 0
    for problem in source.problems():
        steps = document(problem, rng)
        scores = source.check_steps(problem, steps)
        for step, score in zip(steps, scores, strict=True):
            slips += score == 0.0
            assert score != 0.0 or step.tag in ("next_step", "direct_answer", "refine")
        verdict = source.judge(problem, TABLE.render(steps))
        assert verdict.status in (Status.RIGHT, Status.WRONG)
        if steps[-2].text.endswith("ok"):  # not the other way round: two slips may cancel out
            assert verdict.right
        assert all(score in (None, 1.0) for score in source.check_steps(problem, document(problem, rng, slip=0.0)))
    assert slips > 50


def test_quick_carries_are_wrong_as_often_as_promised():
    rng, source = random.Random(1), Arithmetic()
    problem = Problem("p", "1 8 + 7", "2 5", data={"expression": ["18", "+", "7"]})
    right = sum(source.judge(problem, chain_of_thought(problem, rng)).right for _ in range(2000))
    assert 0.36 < right / 2000 < 0.44


@given(
    st.lists(st.sampled_from(["next_step", "direct_answer", "verify", "refine", "output", "clarify"]), max_size=6),
    st.data(),
)
def test_nothing_that_a_model_may_write_raises(tags, data):
    pieces = st.lists(st.sampled_from("0 1 2 5 9 + - * = , ; : ( ) ok wrong < > x".split()), max_size=12).map(" ".join)
    steps = [Step(tag, data.draw(pieces)) for tag in tags]
    scores = Arithmetic().check_steps(PROBLEM, steps)
    assert len(scores) == len(steps) and set(scores) <= {None, 0.0, 1.0}
    assert Arithmetic().judge(PROBLEM, TABLE.render(steps)).gold == "3 9"


def test_steps_are_scored_as_they_are():
    steps = [
        Step("subquestion", "7 * 3 : 7 * 3 = 2 1"),
        Step("next_step", "7 * 3 = 2 1 ; 1 8 + 2 1"),
        Step("direct_answer", "1 8 + 2 1 = 2 9"),
        Step("verify", "7 * 3 : 7 * 3 = 2 1 ; 1 8 + 2 1 : 8 + 1 = 9 , 1 + 2 = 3 ; wrong"),
        Step("refine", "1 8 + 2 1 = 3 9 ; 3 9"),
        Step("output", "3 9"),
    ]
    assert Arithmetic().check_steps(PROBLEM, steps) == [None, 1.0, 0.0, 1.0, 1.0, 1.0]
    assert Arithmetic().judge(PROBLEM, TABLE.render(steps)).right
    assert Arithmetic().judge(PROBLEM, TABLE.render(steps[:3])).answer == "2 9"
    assert Arithmetic().judge(PROBLEM, TABLE.render(steps[:2])).status is Status.NO_ANSWER
    assert Arithmetic().judge(PROBLEM, "7 * 3 = 2 1 , 1 8 + 2 1 = 3 9").right
    assert Arithmetic().check_steps(PROBLEM, [Step("next_step", "1 8 + 7 = 2 5 ; 2 5 * 3")]) == [0.0]  # * comes first


def test_the_leftmost_operation_that_can_be_worked_out_is_next():
    assert next_operation(["2", "-", "(", "3", "+", "4", "*", "5", ")"]) == Operation(4, "*", 5, 5)
    assert value_of(["50", "*", "3"]) is None and spell(25) == "2 5"


@pytest.mark.parametrize("settings", [{"split": "all"}, {"fewest": 3, "most": 2}, {"largest": 100}, {"count": 0}])
def test_settings_out_of_range_are_one_line(settings):
    with pytest.raises(UserError) as error:
        Arithmetic(**settings)
    assert "\n" not in str(error.value)
