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
