"""``rftt check`` as a command: its config, its mistakes, and that it needs no torch."""

import json
import subprocess
import sys

import pytest
import yaml

from rftt_lightning.app import cli


@pytest.fixture
def pairs(tmp_path):
    path = tmp_path / "pairs.jsonl"
    rows = [{"gold": "1/2", "response": "0.5"}, {"gold": None, "response": "None"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_config_says_what_options_say_and_options_win(pairs, tmp_path, capsys):
    config = tmp_path / "check.yaml"
    config.write_text(yaml.safe_dump({"file": str(pairs), "output": str(tmp_path / "a.jsonl"), "kind": "answer"}))
    assert cli.main(["check", "--config", str(config)]) == 0
    assert cli.main(["check", "--config", str(config), "--output", str(tmp_path / "b.jsonl")]) == 0
    written = [(tmp_path / name).read_text().splitlines() for name in ("a.jsonl", "b.jsonl")]
    assert written[0] == written[1]
    assert [json.loads(line)["verdict"] for line in written[0]] == ["right", "unparsable_gold"]
    capsys.readouterr()
    with pytest.raises(SystemExit):
        cli.main(["check", "--config", str(config), "--workers", "3", "--print_config"])
    printed = yaml.safe_load(capsys.readouterr().out)
    assert (printed["file"], printed["kind"], printed["workers"]) == (str(pairs), "answer", 3)


@pytest.mark.parametrize(
    "args, said",
    [
        ([], "nothing to check"),
        (["--nonsense"], "nonsense"),
        (["--explain", "1"], "explain"),
        (["{pairs}", "--workers", "0"], "workers is 0; it must be at least 1"),
        (["{pairs}", "--workers", "many"], "many"),
        (["{pairs}", "--output="], "cannot write ''"),
    ],
)
def test_mistakes_are_one_line(pairs, capsys, args, said):
    assert cli.main(["check", *(arg.format(pairs=pairs) for arg in args)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and said in err


def test_torch_is_not_needed():
    code = (
        "import sys; sys.modules['torch'] = None; from rftt_lightning.app.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "check", "--explain", "1/2", "0.5"], capture_output=True, text=True
    )
    assert done.returncode == 0 and "right" in done.stdout, done.stderr
