"""The countdown world: disjoint splits, an exact judge, an exact step checker, a base that loads."""

import itertools
import random

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from rftt_lightning.core.contracts import Problem, Status, Step, UserError
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.vocab import add_functional_tokens
from rftt_lightning.tiny.countdown import Countdown, chain_of_thought, document, finals, moves

TABLE = TokenTable.from_yaml()
BASE = resolve("pkg:tiny/checkpoints/countdown")
PROBLEM = Problem("p", "3 7 12 target 9", data={"numbers": [3, 7, 12], "target": 9})


def brute_force(numbers: tuple[int, ...]) -> set[int]:
    """Values reachable with every number, by trying all orders and signs."""
    if len(numbers) == 1:
        return {numbers[0]}
    found = set()
    for i, j in itertools.permutations(range(len(numbers)), 2):
        rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
        for value in (numbers[i] + numbers[j], numbers[i] - numbers[j], numbers[i] * numbers[j]):
            if 0 <= value <= 99:
                found |= brute_force((*rest, value))
    return found


def test_splits_are_disjoint_solvable_and_always_the_same():
    parts = {split: Countdown(split, count=300).problems() for split in ("train", "validation", "test")}
    keys = [{(*sorted(p.data["numbers"]), p.data["target"]) for p in part} for part in parts.values()]
    assert not keys[0] & keys[1] and not keys[0] & keys[2] and not keys[1] & keys[2]
    assert all(p.data["target"] in brute_force(tuple(p.data["numbers"])) for p in parts["test"])
    assert list(Countdown("test", count=300).problems()) == list(parts["test"])
    assert list(Countdown("test", count=100, start=200).problems()) == list(parts["test"])[200:]


@pytest.mark.parametrize("seed", range(20))
def test_moves_reach_what_brute_force_reaches(seed):
    numbers = [random.Random(seed).randint(1, 20) for _ in range(3)]
    assert set(finals(numbers)) == brute_force(tuple(numbers))
    assert all(move.value == eval(f"{move.left}{move.sign}{move.right}") for move in moves(numbers))  # noqa: S307  our own


def test_every_step_of_a_base_document_is_right_and_legal():
    source, rng = Countdown("train", count=300), random.Random(0)
    for problem in source.problems():
        steps = document(problem, rng)
        scores = source.check_steps(problem, steps)
        once = sum(step.tag == "refine" for step in steps) < 2  # later ones may come back to an earlier attempt
        assert all(
            score in (None, 1.0) or not (once or tag in ("verify", "output"))
            for score, (tag, _) in zip(scores, steps, strict=True)
        )
        assert steps[-1].tag == "output"
        attempt = source.judge(problem, TABLE.render(steps))
        checks = [step.text.endswith("ok") for step in steps if step.tag == "verify"]
        if checks and steps[-2].tag == "verify":
            assert checks[-1] == attempt.right
        assert source.judge(problem, chain_of_thought(problem, rng)).status in (Status.RIGHT, Status.WRONG)


@pytest.mark.parametrize(
    "answer, status",
    [
        ("3 * 7 = 21 , 21 - 12 = 9", Status.RIGHT),
        ("12 - 7 = 5 , 5 + 3 = 8", Status.WRONG),  # another value
        ("3 * 7 = 22 , 22 - 12 = 9", Status.WRONG),  # false
        ("12 - 3 = 9", Status.WRONG),  # a number is left over
        ("3 + 3 = 6 , 6 + 3 = 9", Status.WRONG),  # a number twice
        ("3 * 7 = 21 , 21 - 12 = 9 , 9 - 0 = 9", Status.WRONG),
        ("no idea", Status.NO_ANSWER),
        ("", Status.NO_ANSWER),
        ("9" * 100_000, Status.NO_ANSWER),
        ("__import__('os').system('true') = 9", Status.NO_ANSWER),
    ],
)
def test_judge_evaluates_the_equations(answer, status):
    source, problem = Countdown("train", count=1), PROBLEM
    assert source.judge(problem, answer).status is status
    assert source.judge(problem, f"<output>{answer}</output>").status is status


def test_steps_are_scored_as_they_are():
    source, problem = Countdown("train", count=1), PROBLEM
    steps = [
        Step("clarify", "whatever"),
        Step("next_step", "3 + 7 = 10 ; 12 10"),
        Step("next_step", "12 - 10 = 2 ; 2"),
        Step("verify", "2 , 9 ; wrong"),
        Step("refine", "3 * 7 = 21 ; 12 21"),
        Step("next_step", "21 - 12 = 9 ; 9"),
        Step("verify", "9 , 9 ; ok"),
        Step("output", "3 * 7 = 21 , 21 - 12 = 9"),
    ]
    assert source.check_steps(problem, steps) == [None] + [1.0] * 7
    for index, text in [
        (1, "3 + 7 = 11 ; 12 11"),
        (2, "12 - 9 = 3 ; 3"),
        (3, "2 , 9 ; ok"),
        (7, "12 - 3 = 9"),
        (4, "hm"),
    ]:
        broken = [*steps[:index], Step(steps[index].tag, text), *steps[index + 1 :]]
        assert source.check_steps(problem, broken)[index] == 0.0
    assert source.judge(problem, TABLE.render(steps[:-1])).answer == steps[-1].text


@pytest.mark.parametrize(
    "last, score",
    [
        (Step("refine", "12 - 10 = 2 ; 2"), 0.0),  # the first attempt, made before the one that it replaces
        (Step("refine", "12 * 3 = 36 , 36 - 7 = 29"), 1.0),
        (Step("refine", "3 + 7 = 10 , 12 - 10 = 2"), 0.0),
        (Step("refine", "3 * 7 = 21 ; 12 21"), 1.0),
        (Step("refine", "3 + 7 = 10 ; 12 10"), 0.0),  # the very step that it replaces
    ],
)
def test_going_round_in_circles_is_wrong(last, score):
    source, problem = Countdown("train", count=1), PROBLEM
    steps = [
        Step("next_step", "3 + 7 = 10 ; 12 10"),
        Step("next_step", "12 - 10 = 2 ; 2"),
        Step("verify", "2 , 9 ; wrong"),
        Step("refine", "12 + 10 = 22 ; 22"),
        Step("verify", "22 , 9 ; wrong"),
    ]
    assert source.check_steps(problem, [*steps, last]) == [1.0] * 5 + [score]


@pytest.mark.parametrize(
    "settings",
    [{"split": "tests"}, {"count": 0}, {"start": -1}, {"numbers": 1}, {"numbers": 2, "largest": 3, "count": 500}],
)
def test_settings_out_of_range_are_one_line(settings):
    with pytest.raises(UserError) as error:
        Countdown(**settings).problems()
    assert "\n" not in str(error.value)


def test_the_base_loads_and_reads_every_word_back():
    model, tokenizer = AutoModelForCausalLM.from_pretrained(BASE), AutoTokenizer.from_pretrained(BASE)
    for problem in Countdown("train", count=20).problems():
        steps = document(problem, random.Random(problem.id))
        for text in (problem.question, *(step.text for step in steps)):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert tokenizer.unk_token_id not in ids and tokenizer.decode(ids) == text
    rows = model.get_input_embeddings().weight.shape[0]
    fresh = add_functional_tokens(model, tokenizer, TABLE)
    assert len(fresh) == 16 and model.get_input_embeddings().weight.shape[0] == rows + 16
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "1 2"}], add_generation_prompt=True, tokenize=False
    )
    assert chat == "<|user|>1 2<|end|><|assistant|>"
