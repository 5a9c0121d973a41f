import json

import pytest

from rftt_lightning.app.check import main
from rftt_lightning.core.contracts import UserError

ROWS = [
    {"gold": "1/2", "response": r"so \boxed{0.5}", "id": 7},
    {"gold": "3", "response": "the answer is 4"},
    {"gold": "3", "response": None},
    {"gold": "", "response": "3"},
]


def test_file_is_judged_line_by_line(tmp_path, capsys):
    source, output = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert main([str(source), "--output", str(output)]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [line["verdict"] for line in lines] == ["right", "wrong", "no_answer", "unparsable_gold"]
    assert lines[0]["id"] == 7
    assert lines[0]["rule"] == "rational"
    assert "4 pairs: 1 right, 1 wrong, 1 no_answer, 1 unparsable_gold, 0 timed_out" in capsys.readouterr().out


def test_explain(capsys):
    assert main(["--explain", r"\frac12", "I get 0.5"]) == 0
    out = capsys.readouterr().out
    assert "right" in out
    assert "rational" in out
    assert "/(1, 2)" in out


@pytest.mark.parametrize(
    ("content", "message"),
    [('{"gold": "1"}', "line 1: no field response"), ("", "no lines"), ("{", "line 1: not JSON")],
)
def test_mistakes(tmp_path, content, message):
    path = tmp_path / "in.jsonl"
    path.write_text(content)
    with pytest.raises(UserError, match=message):
        main([str(path)])


def test_nothing_to_do_and_unwritable(tmp_path):
    with pytest.raises(UserError, match="--explain"):
        main([])
    source = tmp_path / "in.jsonl"
    source.write_text(json.dumps(ROWS[0]))
    with pytest.raises(UserError, match="cannot write"):
        main([str(source), "--output", str(source / "x" / "out.jsonl")])


def test_texts_may_begin_with_a_minus(capsys):
    assert main(["--explain", r"-\frac12", "-0.5"]) == 0
    assert "right" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--explain", "1"], "two texts"),
        (["a.jsonl", "--explain", "1", "1"], "leave out the file"),
        (["a.jsonl", "--disagreements", "d.jsonl"], "--second"),
        (["a.jsonl", "--second", "math_verify", "--output", "o", "--disagreements", "o"], "one file"),
        (["a.jsonl", "--workers", "0"], "workers"),
    ],
)
def test_wrong_usages(args, message):
    with pytest.raises(UserError, match=message):
        main(args)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"gold": [1], "response": "1"}', "gold is"),
        ('{"gold": "1", "response": NaN}', "response is"),
        ('{"gold": ' + "1" * 5000 + ', "response": "1"}', "not JSON"),
    ],
)
def test_values_that_are_no_answers(row, message, tmp_path):
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text('{"gold": "1", "response": "1"}\n' + row)
    output.write_text("older")
    with pytest.raises(UserError, match=f"line 2: {message}"):
        main([str(path), "--output", str(output)])
    assert output.read_text() == "older"
    assert sorted(tmp_path.iterdir()) == [path, output]


def test_surrogates_are_written_and_read_back(tmp_path):
    path, output = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    path.write_text(json.dumps({"gold": "½", "response": "\ud800 0.5"}))
    assert main([str(path), "--output", str(output)]) == 0
    assert json.loads(output.read_text())["response"] == "\ud800 0.5"


def test_second_opinion(tmp_path, capsys):
    pytest.importorskip("math_verify")
    path, output, differ = (tmp_path / name for name in ("in.jsonl", "out.jsonl", "differ.jsonl"))
    rows = [{"gold": "1/2", "response": "0.5"}, {"gold": "2 \\text{ hours}", "response": "120 \\text{ minutes}"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main([str(path), "--output", str(output), "--second", "math_verify", "--disagreements", str(differ)]) == 0
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["verdict"], line["math_verify"]) for line in lines] == [("right", "right"), ("right", "wrong")]
    assert [json.loads(line)["gold"] for line in differ.read_text().splitlines()] == [rows[1]["gold"]]
    assert "disagrees on 1 of 2" in capsys.readouterr().out
    with pytest.raises(UserError, match="use math_verify"):
        main([str(path), "--second", "sympy"])
