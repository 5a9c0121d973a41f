import json
import time
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from rftt_lightning.core.contracts import Problem, ProblemSource, Status, UserError
from rftt_lightning.search.problems import (
    GSM8K,
    MATH,
    JsonlProblems,
    OlympiadBench,
    Subset,
    check_overlap,
    deduplicate,
    refuse_overlap,
)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def questions(n, words=30):
    return [
        Problem(f"p{i}", " ".join(f"w{(i * 7919 + j * 104729) % 99991}" for j in range(words)), "1") for i in range(n)
    ]


def test_gsm8k_gold(tmp_path):
    path = write(tmp_path / "g.jsonl", [{"question": "How many?", "answer": "a = 3\n#### 1,200", "idx": 4}])
    (problem,) = GSM8K(path).problems()
    assert problem == Problem("g/4", "How many?", "1200")
    assert GSM8K(path).judge(problem, r"so \boxed{1,200}").right


def test_answers_that_say_the_same_are_found_without_a_gold_one(tmp_path):
    source = GSM8K(write(tmp_path / "g.jsonl", [{"question": "How many?", "answer": "#### 7"}]))
    answers = ["10", "3/4", "10.0", r"10\text{ cm}", "(1,2)", "0.75", "(1, 2)", "x+1", "1+x", "cm", "10"]
    kinds = {"10": ["10.0", r"10\text{ cm}"], "3/4": ["0.75"], "(1,2)": ["(1, 2)"], "x+1": ["1+x"], "cm": []}
    assert source.same(answers) == {text: kind for kind, others in kinds.items() for text in (kind, *others)}
    assert Subset(source).same(["1/2", "0.5"]) == {"1/2": "1/2", "0.5": "1/2"} and source.same([]) == {}


def test_math_gold_from_answer_or_box(tmp_path):
    with_answer = {
        "problem": "a?",
        "solution": r"\boxed{9}",
        "answer": r"\frac12",
        "level": 2,
        "subject": "Algebra",
        "unique_id": "u",
    }
    without = {
        "problem": "b?",
        "solution": r"first \boxed{1}, then $\boxed{\frac{1}{3}}$.",
        "type": "Algebra",
        "level": "Level 3",
    }
    one, two = MATH(write(tmp_path / "m.jsonl", [with_answer, without])).problems()
    assert (one.answer, one.level, one.subject) == (r"\frac12", "2", "Algebra")
    assert (two.answer, two.subject) == (r"\frac{1}{3}", "Algebra")


@pytest.mark.parametrize(
    ("answers", "several", "unit", "good", "bad"),
    [
        (["2"], False, None, "2", "3"),
        (["$2 n$"], False, None, "n+n", "n^2"),
        (["1,3,5"], True, None, "5, 1, 3", "1, 3"),
        (["100,200"], True, None, "200, 100", "100200"),
        (["$69$,$84$"], True, None, "84,69", "69"),
        (["$(1,2),(3,4)$"], True, None, "(3,4), (1,2)", "(2,1),(4,3)"),
        (["45"], False, "minute", r"45 \text{ minutes}", r"45 \text{ hours}"),
        (["4.2"], False, "%", r"4.2\%", r"42\%"),
        (["$\\angle A=90$", "$60$"], True, "^{\\circ}", "90, 60", "90"),
    ],
)
def test_olympiad_gold(tmp_path, answers, several, unit, good, bad):
    row = {
        "id": 7,
        "question": "q",
        "context": "c",
        "final_answer": answers,
        "is_multiple_answer": several,
        "unit": unit,
    }
    source = OlympiadBench(write(tmp_path / "o.jsonl", [row]))
    (problem,) = source.problems()
    assert problem.question == "c\n\nq"
    verdicts = source.judge_many([(problem, rf"\boxed{{{good}}}"), (problem, rf"\boxed{{{bad}}}")])
    assert [v.status for v in verdicts] == [Status.RIGHT, Status.WRONG]


def test_fields_are_configurable_and_rows_deduplicated(tmp_path):
    rows = [{"q": "One plus one?", "a": "2"}, {"q": "one  plus ONE ?", "a": "2"}, {"q": "two?", "a": "2"}]
    source = JsonlProblems(write(tmp_path / "x.jsonl", rows), question="q", answer="a")
    assert [p.id for p in source.problems()] == ["x/0", "x/2"]


def test_slices_of_one_shuffle_are_disjoint_and_repeatable(tmp_path):
    path = write(tmp_path / "x.jsonl", [{"question": f"question {i}", "answer": i} for i in range(50)])
    parts = [JsonlProblems(path, start=s, limit=20, shuffle_seed=3).problems() for s in (0, 20, 40)]
    ids = [p.id for part in parts for p in part]
    assert len(set(ids)) == len(ids) == 50
    assert ids != [f"x/{i}" for i in range(50)]
    assert parts[0] == JsonlProblems(path, limit=20, shuffle_seed=3).problems()
    whole = JsonlProblems(path)
    assert Subset(whole, start=5, limit=2).problems() == whole.problems()[5:7]
    assert Subset(whole).judge(whole.problems()[3], "3").right
    with pytest.raises(UserError, match="start"):
        Subset(whole, start=50).problems()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"question": "a", "answer": "1"}\n{"question": ', r"x\.jsonl, line 2: not JSON"),
        ('{"question": "a", "answer": "1"}\n[1]', r"line 2: a JSON list"),
        ('{"question": "a"}', r"line 1: no field 'answer'"),
        ('{"question": " ", "answer": "1"}', r"line 1: the question is empty"),
        ('{"question": "a", "answer": ""}', r"line 1: the gold answer is empty"),
        ('{"question": "a", "answer": "1"}\n{"question": null, "answer": "1"}', r"line 2: question is null, not text;"),
        ('{"question": ["a"], "answer": "1"}', r'line 1: question is \["a"\], not text;'),
        ('{"question": 3, "answer": "1"}', r"line 1: question is 3, not text;"),
        ('{"question": "a", "answer": null}', r"line 1: answer is null, not text or a number"),
        ('{"question": "a", "answer": true}', r"line 1: answer is true, not text or a number"),
        ('{"question": "a", "answer": ["1"]}', r'line 1: answer is \["1"\], not text or a number'),
        ('[{"question": "a", "answer": "1"}, 5]', r"x\.jsonl, record 2: a JSON int"),
        ('[{"question": "a", "answer": "1"}', r"x\.jsonl: not JSON.*one object a line"),
        ("", "no problem left"),
        ("\n\n", "no problem left"),
    ],
)
def test_bad_files_name_the_line(tmp_path, content, message):
    path = tmp_path / "x.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        JsonlProblems(str(path)).problems()
    assert "\n" not in str(caught.value)


def test_an_array_is_read_as_its_lines_are(tmp_path):
    rows = [
        {"question": "a\u2028b", "final_answer": ["1"], "id": 3, "unit": None},
        {"question": "c", "final_answer": [2], "id": None},
    ]
    lines = write(tmp_path / "o.jsonl", rows)
    array = tmp_path / "o.json"
    array.write_text(json.dumps(rows, indent=4, ensure_ascii=False))
    found = OlympiadBench(str(array)).problems()
    assert list(found) == list(OlympiadBench(lines).problems()) and [(p.id, p.answer) for p in found] == [
        ("o/3", "1"),
        ("o/1", "2"),
    ]
    array.write_text(json.dumps([{"question": "c", "final_answer": [None]}]))
    with pytest.raises(UserError, match=r"o\.json, record 1: final_answer is null"):
        OlympiadBench(str(array)).problems()


def test_null_is_as_absent_where_a_field_may_be(tmp_path):
    row = {"question": "a", "answer": 0.5, "id": None, "level": None, "subject": None}
    (problem,) = JsonlProblems(write(tmp_path / "x.jsonl", [row])).problems()
    assert problem == Problem("x/0", "a", "0.5")


def test_other_mistakes(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        GSM8K(str(tmp_path / "none.jsonl")).problems()
    with pytest.raises(UserError, match="limit"):
        GSM8K("x.jsonl", limit=0)
    with pytest.raises(UserError, match="gold"):
        JsonlProblems("x.jsonl", gold="magic")
    plain = write(tmp_path / "p.jsonl", [{"question": "q", "answer": "18"}])
    with pytest.raises(UserError, match=r"line 1: .*####"):
        GSM8K(plain).problems()
    binary = tmp_path / "b.jsonl"
    binary.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        JsonlProblems(str(binary)).problems()


def test_hub_names_go_to_datasets(monkeypatch):
    import datasets

    asked = []

    def load(name, subset, split):
        asked.append((name, subset, split))
        return [{"question": "q", "answer": "#### 5"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    (problem,) = GSM8K(split="train").problems()
    assert asked == [("openai/gsm8k", "main", "train")]
    assert problem.answer == "5"
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: (_ for _ in ()).throw(OSError("offline\nnow")))
    with pytest.raises(UserError, match="offline now"):
        GSM8K().problems()


def test_overlap_exact_near_and_none():
    held_out = questions(20)
    copied = Problem("t0", held_out[3].question.upper() + " !", "")
    quoted = Problem("t1", "please solve this : " + held_out[5].question + " thanks", "")
    fresh = Problem("t2", " ".join(f"v{i}" for i in range(40)), "")
    overlap = check_overlap([copied, quoted, fresh], held_out)
    assert overlap.exact == (("t0", "p3"),)
    assert overlap.near == (("t1", "p5", 1.0),)
    assert not check_overlap([fresh], held_out)


def test_short_questions_match_exactly_only():
    held_out = [Problem("h", "reach 12 from 3 4 5", "")]
    assert not check_overlap([Problem("t", "reach 12 from 3 4 6", "")], held_out)
    assert check_overlap([Problem("t", "Reach 12 from 3, 4, 5", "")], held_out).exact == (("t", "h"),)


def test_signs_make_other_questions():
    assert not check_overlap([Problem("t", "what is 3 + 4", "")], [Problem("h", "what is 3 - 4", "")])


def test_refusal_says_counts_example_and_mend():
    problems = questions(3)
    with pytest.raises(UserError, match=r"3 identical .*p0 = p0.*allow_overlap: true") as caught:
        refuse_overlap(problems, problems)
    assert "\n" not in str(caught.value)
    assert len(refuse_overlap(problems, problems, allow_overlap=True).exact) == 3
    assert not refuse_overlap(problems[:1], problems[1:])


def test_overlap_is_fast():
    train, held_out = questions(12_000, 60), questions(2_000, 60)
    began = time.monotonic()
    assert len(check_overlap(train, held_out).exact) == 2_000
    assert time.monotonic() - began < 15


ARITHMETIC = [
    "(2+3)*4",
    "2+3*4",
    "3.5",
    "3 5",
    "35",
    "6 × 3",
    "6 ÷ 3",
    "6 − 3",
    "6 - 3",
    "x ≤ 3",
    "x ≥ 3",
    "5!",
    "5",
    "√16",
    "16",
]
ARITHMETIC += ["a-(b-c)", "a-b-c", "50%", "50", "|x|", "x", "1,2", "1.2", "12", "(1,3)", "[1,3]"]


def test_questions_that_differ_in_a_sign_are_different_problems():
    problems = [Problem(str(i), f"What is {text}?", "") for i, text in enumerate(ARITHMETIC)]
    assert deduplicate(problems) == problems


@pytest.mark.parametrize(
    "again", ["what is  $\\frac{1}{2}$ of 1000", "What is \\frac{1}{2} of 1,000?", '"What is $\\frac{1}{2}$ of 1000."']
)
def test_the_same_question_in_another_dress_is_left_out_and_counted(tmp_path, again):
    rows = [{"question": text, "answer": "500"} for text in ("What is $\\frac{1}{2}$ of 1,000?", again, "What is 2?")]
    with pytest.warns(UserWarning, match="1 of 3 problems repeat a question"):
        assert [p.id for p in JsonlProblems(write(tmp_path / "p.jsonl", rows)).problems()] == ["p/0", "p/2"]


def test_repeated_ids_become_unique():
    assert len({p.id for p in deduplicate([Problem("a", "x"), Problem("a", "y"), Problem("a", "x")])}) == 2


@pytest.mark.parametrize("name", ["gsm8k", "math500", "olympiadbench"])
def test_shipped_data_configs_build_a_source(name):
    parser = ArgumentParser()
    parser.add_argument("--source", type=ProblemSource, sub_configs=True)
    config = Path(__file__).parents[2] / "configs" / "data" / f"{name}.yaml"
    parsed = parser.parse_args([f"--source={config}", "--source.limit=5"])
    assert parser.instantiate(parsed).source.limit == 5
