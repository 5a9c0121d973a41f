"""Plans of commands: what they expand to, what runs when, what is not run again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rftt_lightning.app.sweep import Run, _wanted, expand, held
from rftt_lightning.core.contracts import UserError

ROOT = Path(__file__).resolve().parents[2]
TOUCH = "import pathlib,sys; p=pathlib.Path(sys.argv[1]); p.mkdir(parents=True, exist_ok=True)"


def plan(stages, seeds=(0,), **variables):
    return expand(stages, Path("out"), seeds, variables)


def sweep(tmp_path, config, *options, **others):
    """``rftt sweep`` in a process of its own."""
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "rftt_lightning", "sweep", "--config", str(file), "--out", str(tmp_path / "out")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    settings = {"env": env, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, **others}
    return subprocess.Popen([*command, *options], **settings)


def wait(process):
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def note(tmp_path, text):
    """A command that appends a word to a file, so that one sees what ran, in which order."""
    return f"python -c \"open('{tmp_path / 'ran'}', 'a').write('{text} ')\""


def ran(tmp_path):
    path = tmp_path / "ran"
    return path.read_text().split() if path.exists() else []


def test_a_stage_runs_for_each_seed_if_it_or_what_it_builds_on_names_the_seed():
    stages = {
        "evaluate": "rftt evaluate --model $sft --out $here",  # written before what it needs
        "sft": "rftt sft fit --data $trees --seed $seed",
        "trees": "rftt search --out $here",
        "report": "python table.py $out $length",
    }
    assert plan(stages, (3, 5), length=7) == [
        Run("seed-3/evaluate", "evaluate", ("rftt", "evaluate", "--model", "out/seed-3/sft", "--out", "out/seed-3/evaluate"), ("seed-3/sft",)),
        Run("seed-5/evaluate", "evaluate", ("rftt", "evaluate", "--model", "out/seed-5/sft", "--out", "out/seed-5/evaluate"), ("seed-5/sft",)),
        Run("seed-3/sft", "sft", ("rftt", "sft", "fit", "--data", "out/trees", "--seed", "3"), ("trees",)),
        Run("seed-5/sft", "sft", ("rftt", "sft", "fit", "--data", "out/trees", "--seed", "5"), ("trees",)),
        Run("trees", "trees", ("rftt", "search", "--out", "out/trees"), ()),
        Run("report", "report", ("python", "table.py", "out", "7"), (), last=True),
    ]  # fmt: skip


def test_only_takes_what_it_builds_on_with_it():
    stages = {"a": "rftt search --seed $seed", "b": "rftt curate $a", "c": "rftt sft $b", "d": "rftt tokens"}
    assert [run.name for run in _wanted(plan(stages, (0, 1)), ["b"])] == [
        "seed-0/a",
        "seed-1/a",
        "seed-0/b",
        "seed-1/b",
    ]
    assert [run.name for run in _wanted(plan(stages), [])] == ["seed-0/a", "seed-0/b", "seed-0/c", "d"]
    stages["table"] = "python table.py $out $c"
    assert [run.name for run in _wanted(plan(stages), ["table"])] == [
        "seed-0/a",
        "seed-0/b",
        "seed-0/c",
        "seed-0/table",
    ]


def test_braces_and_quotes_reach_the_command_as_they_are():
    (run,) = plan({"a": """rftt evaluate --mask '["verify", "refine"]' --x '{"a": $n}' --cost $$5"""}, n=2)
    assert run.args == ("rftt", "evaluate", "--mask", '["verify", "refine"]', "--x", '{"a": 2}', "--cost", "$5")


def test_a_variable_may_be_several_words_and_name_stages_and_variables():
    stages = {"a": "rftt search --seed $seed", "b": "rftt curate", "best": "python choose.py --world '$world' ${many}"}
    *_, best = plan(stages, (4,), many="$a $b --top $n", n=2, world="my world")
    words = ("python", "choose.py", "--world", "my world", "out/seed-4/a", "out/b", "--top", "2")
    assert best == Run("seed-4/best", "best", words, ("seed-4/a", "b"))
    with pytest.raises(UserError, match="stage a: variables name each other"):
        plan({"a": "rftt search $n"}, n="$m", m="$n")


@pytest.mark.parametrize(
    "stages, message",
    [
        ({"a": "rftt search --out $b", "b": "rftt search --out $a"}, "need each other: "),
        ({"a": "rftt search --out $a"}, "need each other: a <- a"),
        ({"a": "rftt search --out $elsewhere"}, r"\$elsewhere is no stage, none of variables \(n\)"),
        ({"../a": "rftt search"}, r"stage '../a': give it a name of letters"),
        ({"": "rftt search"}, "stage '': give it a name of letters"),
        (
            {"logs": "rftt search"},
            "stage 'logs': give it a name of letters, digits and _, none of here, out, seed, logs",
        ),
        ({"a": "rm -rf $here"}, "a must begin with rftt or python"),
        ({"a": ""}, "a must begin with rftt or python"),
        ({"a": "rftt 'search"}, "No closing quotation"),
        ({"a": "rftt search --cost 5$"}, r"a \$ must stand before a name"),
        ({"a": "rftt search --trees $b", "b": "python table.py $out"}, r"stage a builds on one that names \$out"),
    ],
)
def test_a_plan_that_cannot_be_run_says_why(stages, message):
    with pytest.raises(UserError, match=message):
        plan(stages, n=1)


def test_a_variable_that_nothing_names_is_refused():
    stages = {"a": "rftt search --config ${world}/search.yaml $more"}
    with pytest.raises(UserError, match=r"variables\.wrld: .* those named are world, more, n$"):
        plan(stages, world="configs", more="--n $n", n=1, wrld="x")
    with pytest.raises(UserError, match=r"variables\.n: .* those named are none"):
        plan({"a": "rftt search --n n $$n"}, n=1)


def test_seeds_are_there_and_each_once():
    for seeds in ((), (1, 1)):
        with pytest.raises(UserError, match="seeds is"):
            plan({"a": "rftt search"}, seeds)


@pytest.mark.parametrize("words", [("--config", "{}"), ("--config={}",), ("sft", "fit", "-c", "{}")])
def test_the_digest_changes_with_command_and_config(tmp_path, words):
    config = tmp_path / "c.yaml"
    run = Run("a", "a", ("rftt", *(word.format(config) for word in words)), ())
    missing = run.digest
    config.write_text("x: 1")
    assert missing != run.digest
    before = run.digest
    assert before == run.digest != Run("a", "a", (*run.args, "--n", "2"), ()).digest
    config.write_text("x: 2")
    assert before != run.digest


def test_what_is_done_is_not_run_again_and_other_settings_are_refused(tmp_path):
    stages = {
        "table": f"python -c \"print('the table', open('{tmp_path / 'ran'}').read(), '$out'[-3:])\"",
        "second": f"{note(tmp_path, 'second')} $first",
        "first": f"{note(tmp_path, 'first$seed')}",
    }
    config = {"stages": stages, "show": ["table"], "seeds": [4, 2], "lanes": 1}
    for _ in range(2):
        code, out, err = wait(sweep(tmp_path, config))
        assert code == 0, err
        assert out.endswith("the table first4 first2 second second  out\n")
        assert ran(tmp_path) == ["first4", "first2", "second", "second"]
    known = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert (
        set(known["done"])
        == set(known["seconds"])
        == {"seed-4/first", "seed-2/first", "seed-4/second", "seed-2/second", "table"}
    )
    assert sorted(p.name for p in (tmp_path / "out" / "logs").iterdir())[0] == "seed-2-first.log"
    stages["first"] = note(tmp_path, "other$seed")
    code, _, err = wait(sweep(tmp_path, config))
    assert code == 2 and "seed-4/first of" in err and "other settings" in err and err.count("\n") == 1
    assert len(ran(tmp_path)) == 4


def test_a_stage_may_be_run_again_with_what_builds_on_it(tmp_path):
    """What names $out is run again after anything else was, though it is the first in the plan, and reads what is there."""
    write = f"python -c \"import pathlib, sys; p = pathlib.Path(sys.argv[1]); p.mkdir(parents=True); (p / 'x').touch(); open('{tmp_path / 'ran'}', 'a').write(sys.argv[2] + ' ')\" $here"
    stages = {
        "base": f"{write} base",
        "arm": f"{write} arm-$seed $base",
        "eval": f"{write} eval-$seed $arm",
        "other": f"{write} other $base",
    }
    stages["all"] = f"{write.replace('parents=True', 'parents=True, exist_ok=True')} table $out"
    assert wait(sweep(tmp_path, {"stages": stages, "lanes": 1}, "--only", "[other,all]"))[0] == 0
    assert ran(tmp_path) == ["base", "other", "table"]
    (tmp_path / "out" / "all" / "mine").touch()
    assert wait(sweep(tmp_path, {"stages": stages, "lanes": 1}))[0] == 0
    first = ["base", "other", "table", "arm-0", "eval-0", "table"]
    assert ran(tmp_path) == first
    stages["arm"] = f"{write} new-$seed $base"
    code, _, err = wait(sweep(tmp_path, {"stages": stages}))
    assert code == 2 and "seed-0/arm of" in err and "--again [arm]" in err and err.count("\n") == 1
    code, _, err = wait(sweep(tmp_path, {"stages": stages}, "--again", "[arm]", "--only", "[other]"))
    assert code == 2 and "again names arm, which only leaves out" in err
    stages["other"] = f"{write} changed $base"
    assert wait(sweep(tmp_path, {"stages": stages}, "--again", "[arm]"))[0] == 2  # and nothing is deleted
    assert (tmp_path / "out" / "seed-0" / "eval" / "x").exists() and ran(tmp_path) == first
    stages["other"] = f"{write} other $base"
    for options in (("--again", "[arm]"), ()):
        code, _, err = wait(sweep(tmp_path, {"stages": stages, "lanes": 1}, *options))
        assert code == 0, err
        assert ran(tmp_path) == [*first, "new-0", "eval-0", "table"]
    assert (tmp_path / "out" / "all" / "mine").exists()  # nobody asked for that to be deleted
    known = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert set(known["done"]) == set(known["seconds"]) == {"base", "other", "seed-0/arm", "seed-0/eval", "all"}


def test_a_config_that_is_edited_while_its_stage_runs_counts_as_it_was(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text("x: 1")
    stages = {"a": f"python -c \"open('{config}', 'w').write('x: 2')\" --config {config}"}
    assert wait(sweep(tmp_path, {"stages": stages}))[0] == 0
    code, _, err = wait(sweep(tmp_path, {"stages": stages}))
    assert code == 2 and "a of" in err and "other settings" in err
    config.write_text("x: 1")
    assert wait(sweep(tmp_path, {"stages": stages}))[0] == 0


def test_a_stage_may_name_a_config_that_an_earlier_one_writes(tmp_path):
    write = "import os, sys; os.makedirs(sys.argv[1]); open(sys.argv[1] + '/c.yaml', 'w').write('x: 1')"
    stages = {"a": f'python -c "{write}" $here', "b": f"{note(tmp_path, 'b')} --config $a/c.yaml"}
    for _ in range(2):
        code, _, err = wait(sweep(tmp_path, {"stages": stages}))
        assert code == 0, err
    assert ran(tmp_path) == ["b"]
    (tmp_path / "out" / "a" / "c.yaml").write_text("x: 2")
    code, _, err = wait(sweep(tmp_path, {"stages": stages}))
    assert code == 2 and "b of" in err and "other settings" in err


def test_no_stages_and_a_torn_record_are_refused_in_one_line(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stages.json").write_text('{"done": {"a')
    code, _, err = wait(sweep(tmp_path, {"stages": {"a": note(tmp_path, "a")}}))
    assert code == 2 and "stages.json is damaged" in err and "delete it" in err and err.count("\n") == 1
    code, _, err = wait(sweep(tmp_path, {"stages": {}}))
    assert code == 2 and "stages is empty" in err and err.count("\n") == 1
    assert not ran(tmp_path)


def test_what_builds_on_a_failure_is_left_out_and_the_rest_goes_on(tmp_path):
    stages = {
        "bad": "python -c \"import os, sys; print('oh'); sys.exit(0 if os.path.exists('mended') else 3)\"",
        "after": f"{note(tmp_path, 'after')} $bad",
        "other": note(tmp_path, "other"),
    }
    code, _, err = wait(sweep(tmp_path, {"stages": stages}, cwd=tmp_path))
    assert code == 1 and "bad failed with exit status 3" in err and "oh" in err
    assert ran(tmp_path) == ["other"]
    (tmp_path / "mended").touch()
    code, _, err = wait(sweep(tmp_path, {"stages": stages}, cwd=tmp_path))
    assert code == 0, err
    assert ran(tmp_path) == ["other", "after"]


@pytest.mark.parametrize("number, code", [(signal.SIGTERM, 130), (signal.SIGINT, 130)])
def test_a_signal_reaches_the_commands_and_the_sweep_goes_on_later(tmp_path, number, code):
    """The command saves what it has when it is told to end, as rftt's own do."""
    command = (
        "import signal, sys, time, pathlib\n"
        "here = pathlib.Path(sys.argv[1])\n"
        "if (here / 'saved').exists(): sys.exit(0)\n"
        "here.mkdir(parents=True)\n"
        "def save(*_): (here / 'saved').touch(); sys.exit(130)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "(here / 'ready').touch()\n"
        "time.sleep(60)\n"
    )
    (tmp_path / "command.py").write_text(command)
    config = {"stages": {"a": f"python {tmp_path / 'command.py'} $here"}}
    process = sweep(tmp_path, config)
    until = time.monotonic() + 30
    while not (tmp_path / "out" / "a" / "ready").exists() and time.monotonic() < until:
        time.sleep(0.05)
    again = wait(sweep(tmp_path, config))
    assert again[0] == 2 and "another sweep works in" in again[2]
    process.send_signal(number)
    status, _, err = wait(process)
    assert status == code and "interrupted" in err
    assert (tmp_path / "out" / "a" / "saved").exists()
    known = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert known["done"] == {} and known["seconds"]["a"] > 0
    assert wait(sweep(tmp_path, config))[0] == 0
    assert json.loads((tmp_path / "out" / "stages.json").read_text())["seconds"]["a"] > known["seconds"]["a"]


LONG = (
    "import os, pathlib, subprocess, sys, time, signal\n"
    "here = pathlib.Path(sys.argv[1])\n"
    "here.mkdir(parents=True, exist_ok=True)\n"
    "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "(here / f'ready-{os.getpid()}').touch()\n"
    "sleep = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
    "sleep.wait()\n"
)
"""A command that is deaf to SIGTERM, and a process that it starts."""


def ready(folder):
    """Process ids of the commands that began there, when there is one."""
    until = time.monotonic() + 30
    while not (found := [int(path.name.partition("-")[2]) for path in folder.glob("ready-*")]):
        assert time.monotonic() < until
        time.sleep(0.05)
    return found


def test_commands_that_outlive_a_killed_sweep_are_named_and_nothing_is_begun_beside_them(tmp_path):
    (tmp_path / "long.py").write_text(LONG)
    config = {"stages": {"a": f"python {tmp_path / 'long.py'} $here", "b": note(tmp_path, "b")}, "lanes": 1}
    process = sweep(tmp_path, config)
    (pid,) = ready(tmp_path / "out" / "a")
    process.kill()
    process.communicate()
    try:
        for leader in (pid, None):  # then what it started lives alone
            for options in ((), ("--again", "[a]"), ("--only", "[b]")):
                code, _, err = wait(sweep(tmp_path, config, *options))
                assert code == 2 and f"a (pid {pid})" in err and f"kill -- -{pid}\n" in err and err.count("\n") == 1
            if leader:
                os.kill(pid, signal.SIGKILL)
    finally:
        os.killpg(pid, signal.SIGKILL)
    assert ready(tmp_path / "out" / "a") == [pid] and not ran(tmp_path)
    (tmp_path / "long.py").write_text("")
    code, _, err = wait(sweep(tmp_path, config))
    assert code == 0, err
    assert ran(tmp_path) == ["b"] and json.loads((tmp_path / "out" / "stages.json").read_text())["running"] == {}


def test_a_second_signal_kills_the_commands_that_the_sweep_waits_for(tmp_path):
    (tmp_path / "long.py").write_text(LONG)
    process = sweep(tmp_path, {"stages": {"a": f"python {tmp_path / 'long.py'} $here"}})
    (pid,) = ready(tmp_path / "out" / "a")
    process.send_signal(signal.SIGINT)
    assert "waiting for a; another Ctrl-C kills" in process.stderr.readline()
    assert held(tmp_path / "out" / "logs" / "a.log") and process.poll() is None
    process.send_signal(signal.SIGINT)
    code, _, err = wait(process)
    assert code == 130 and "interrupted" in err
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    until = time.monotonic() + 10
    while held(tmp_path / "out" / "logs" / "a.log"):  # what the command started is dead soon, too
        assert time.monotonic() < until
    known = json.loads((tmp_path / "out" / "stages.json").read_text())
    assert known["seconds"]["a"] > 0 and known["running"] == known["done"] == {}


def test_lanes_bound_how_many_run_together(tmp_path):
    busy = (
        "import os, sys, time, pathlib\n"
        "folder = pathlib.Path(sys.argv[1])\n"
        "mine = folder / f'busy-{os.getpid()}'\n"
        "mine.touch(); time.sleep(0.5)\n"
        "open(folder / 'counts', 'a').write(f'{len(list(folder.glob(\"busy-*\")))} {os.environ[\"OMP_NUM_THREADS\"]}\\n')\n"
        "mine.unlink()\n"
    )
    (tmp_path / "busy.py").write_text(busy)
    stages = dict.fromkeys("abcdef", f"python {tmp_path / 'busy.py'} {tmp_path}")
    code, _, err = wait(sweep(tmp_path, {"stages": stages}, "--lanes", "3", "--threads", "2"))
    assert code == 0, err
    counts = [line.split() for line in (tmp_path / "counts").read_text().splitlines()]
    assert max(int(n) for n, _ in counts) == 3 and {threads for _, threads in counts} == {"2"}
