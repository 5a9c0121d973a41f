"""``rftt evaluate`` on a policy whose every answer is written here, so that each figure can be counted by hand."""

import json
import re
from collections import Counter

import pytest
import yaml

from rftt_lightning.app import cli
from rftt_lightning.core.contracts import (
    QUESTION,
    Backend,
    Completion,
    Problem,
    ProblemSource,
    Segment,
    Status,
    Verdict,
)
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.rewards import Confidence
from rftt_lightning.search.driver import Progress
from rftt_lightning.search.store import read_trees

TABLE = TokenTable.from_yaml()
STRAIGHT, MENDED, SPOILT, LOST = "straight", "mended", "spoilt", "lost"
PATHS = {  # question -> what is answered the first, second, … time; the answer r is right, n is none
    "a": [("r", STRAIGHT), ("w", STRAIGHT), ("w", STRAIGHT), ("r", STRAIGHT)],
    "b": [("r", MENDED), ("w", STRAIGHT), ("r", STRAIGHT), ("r", STRAIGHT)],
    "c": [("w", SPOILT), ("v", STRAIGHT), ("w", STRAIGHT), ("r", STRAIGHT)],
    "d": [("n", LOST), ("w", STRAIGHT), ("r", MENDED), ("r", STRAIGHT)],
}


LEVELS = {"a": "1", "b": "1", "c": "[2]", "d": ""}


class Source(ProblemSource):
    def __init__(self, count: int = len(PATHS)) -> None:
        self.count = count

    def problems(self):
        return [Problem(name, name, answer="r", level=LEVELS[name]) for name in PATHS][: self.count]

    def attempted(self, problem, steps):
        return True

    def judge(self, problem, response):
        answer = TABLE.parse(response)[-1].text
        status = {"r": Status.RIGHT, "n": Status.NO_ANSWER}.get(answer, Status.WRONG)
        return Verdict(status, None if answer == "n" else answer)


class Written(Backend):
    """Answers each question as :data:`PATHS` says; a greedy request gets the first answer."""

    tokens = TABLE
    name = "written"
    batches = 0

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def chat(self, messages):
        return (ord(messages[0].content),)

    def generate(self, requests):
        type(self).batches += 1
        return [self.answer(request) for request in requests]

    def answer(self, request):
        question = chr(request.prompt[0])
        turn = 0 if request.sampling.temperature == 0 else self.asked[question]
        self.asked[question] += request.sampling.temperature > 0
        answer, kind = PATHS[question][turn]
        first = {MENDED: "w", SPOILT: "r"}.get(kind, answer)
        steps = [("next_step", first)]
        if kind in (MENDED, SPOILT):
            steps += [("verify", "hm"), ("refine", answer)]
        if kind != LOST:
            steps += [("output", answer)]
        made = [Segment(tag, (1, 2, turn), (-0.1,) * 3, (0,) * 3, text, True, even(tag)) for tag, text in steps]
        return Completion(tuple(made), even(QUESTION))


def even(after: str) -> dict[str, float]:
    legal = TABLE.legal(after)
    return {tag: 1 / len(legal) for tag in legal}


@pytest.fixture
def config(tmp_path):
    def expander(rollouts: int, temperature: float) -> dict:
        sampling = {"temperature": temperature, "boundary": "sample" if temperature else "argmax"}
        arguments = {"mode": "sample", "rollouts": rollouts, "sampling": sampling}
        return {"class_path": "rftt_lightning.search.expand.TokenExpander", "init_args": arguments}

    settings = {
        "source": {"class_path": f"{__name__}.Source"},
        "backend": {"class_path": f"{__name__}.Written"},
        "reward": {"class_path": "rftt_lightning.policy.rewards.Confidence"},
        "greedy": expander(1, 0.0),
        "search": expander(4, 1.0),
        "rollouts": [1, 2, 4],
        "out": str(tmp_path / "out"),
    }
    path = tmp_path / "evaluate.yaml"
    path.write_text(yaml.safe_dump(settings))
    return path


def evaluate(config, *args: object) -> int:
    return cli.main(["evaluate", "--config", str(config), *map(str, args)])


def test_every_figure_is_what_counting_gives(config, tmp_path, capsys):
    assert evaluate(config) == 0
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    greedy = results["greedy"]
    assert greedy["verdicts"] == {"right": 2, "wrong": 1, "no_answer": 1, "unparsable_gold": 0, "timed_out": 0}
    assert (greedy["accuracy"], greedy["n"], greedy["complete"]) == (0.5, 4, 0.75)
    assert greedy["low"] < 0.5 < greedy["high"]
    assert {level: (row["accuracy"], row["n"]) for level, row in greedy["by_level"].items()} == {
        "1": (1.0, 2),
        "[2]": (0.0, 1),
    }
    assert greedy["by_level"]["[2]"]["verdicts"]["wrong"] == 1 and "by_subject" not in greedy
    assert greedy["wrong_to_right"] == 0.25 and greedy["right_to_wrong"] == 0.25
    use = greedy["functional_tokens_per_answer"]
    assert (use["verify"], use["refine"], use["output"], use["clarify"]) == (0.5, 0.5, 0.75, 0.0)
    assert greedy["tokens_per_problem"] == 3 * (2 + 4 + 4 + 1) / 4
    rows = results["rollouts"]
    assert rows["1"]["majority"]["accuracy"] == rows["1"]["any"]["accuracy"] == 0.5
    assert rows["4"]["any"]["accuracy"] == 1.0
    assert rows["1"]["verdicts"] == greedy["verdicts"] and sum(rows["4"]["verdicts"].values()) == 16
    assert (rows["4"]["verdicts"]["right"], rows["4"]["verdicts"]["no_answer"]) == (8, 1)
    # majority of four: a 2:2 is won by the answer that came first, b 3:1 right, c 2 w against v and r, d 2 r of three answers
    assert rows["4"]["majority"]["accuracy"] == 0.75
    said = capsys.readouterr().out
    assert "by level" in said and "[2]" in said and "by subject" not in said
    assert said.count("by level") == 1 == (tmp_path / "out" / "table.txt").read_text().count("by level")
    assert "4 rollouts" in said and str(tmp_path / "out" / "results.json") in said
    assert (tmp_path / "out" / "accuracy.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(read_trees(tmp_path / "out" / "search"))) == 4


def test_what_is_done_is_not_asked_again(config, tmp_path):
    evaluate(config)
    first, calls = (tmp_path / "out" / "results.json").read_text(), Written.batches
    evaluate(config)
    assert (tmp_path / "out" / "results.json").read_text() == first and Written.batches == calls
    evaluate(config, "--overwrite", "true")
    assert Written.batches > calls


def test_seconds_are_those_of_all_runs(config, tmp_path, monkeypatch):
    def seconds_after(run: float, *args: object) -> tuple[float, float]:
        """Seconds a problem, of the greedy answer and of all rollouts, after one more run whose searches take ``run``."""
        monkeypatch.setattr(Progress, "seconds", run)
        evaluate(config, *args)
        results = json.loads((tmp_path / "out" / "results.json").read_text())
        return results["greedy"]["seconds_per_problem"], results["rollouts"]["4"]["seconds_per_problem"]

    assert seconds_after(8.0, "--source.init_args.count", 2) == (4.0, 4.0)
    assert seconds_after(2.0) == (2.5, 2.5)  # two problems more
    assert seconds_after(9.0) == (2.5, 2.5)  # nothing to do
    assert seconds_after(9.0, "--source.init_args.count", 1) == (2.5, 2.5)
    assert seconds_after(4.0, "--overwrite", "true") == (1.0, 1.0)


class Learned(Confidence):
    """A reward of a user's that does not say what it looks at."""

    uses_gold = True


REWARDS = "rftt_lightning.policy.rewards"
BLEND = f"{{class_path: {REWARDS}.Blend, init_args: {{outcome: {REWARDS}.%s, process: {REWARDS}.ProcessReward}}}}"


@pytest.mark.parametrize(
    "args, said",
    [
        (["--rollouts", "[]"], r"rollouts is \[\]; give one n or more"),
        (["--rollouts", "[0]"], r"rollouts is \[0\]"),
        (["--rollouts", "[-1, 2]"], r"rollouts is \[-1, 2\]"),
        (["--rollouts", "[1, 8]"], r"n = 8, the search makes 4"),
        (["--checks", "[verify, foo]"], r"checks names 'foo'.*clarify"),
        (
            ["--greedy.init_args.sampling.temperature", "0.5"],
            r"greedy\.rollouts is 1 and greedy\.sampling\.temperature 0\.5",
        ),
        (["--greedy.init_args.rollouts", "2"], r"greedy\.rollouts is 2 and"),
        (["--reward", f"{REWARDS}.OutcomeReward"], r"OutcomeReward knows the gold answer.*use Confidence"),
        (["--reward", f"{REWARDS}.ProcessReward"], r"ProcessReward knows the gold answer"),
        (["--reward", BLEND % "OutcomeReward"], r"Blend knows the gold answer"),
        (["--reward", f"{__name__}.Learned"], r"Learned knows.*uses_gold = False"),
        (["--out="], r"--out is empty"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_asked(config, tmp_path, monkeypatch, capsys, args, said):
    monkeypatch.chdir(tmp_path)
    files, calls = sorted(tmp_path.iterdir()), Written.batches
    assert evaluate(config, *args) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and re.search(said, err), err
    assert Written.batches == calls and set(tmp_path.iterdir()) <= {*files, tmp_path / "out"}


@pytest.mark.parametrize(
    "args",
    [
        ["--reward", BLEND % "Confidence"],
        ["--reward", f"{REWARDS}.OutcomeReward", "--search", "null"],  # one answer is not steered
        ["--tokens", "pkg:core/tokens.yaml"],
    ],
)
def test_what_is_no_mistake_is_not_refused(config, args):
    assert evaluate(config, *args) == 0


def test_each_part_may_be_left_out(config, tmp_path):
    assert evaluate(config, "--search", "null", "--out", tmp_path / "greedy") == 0
    assert set(json.loads((tmp_path / "greedy" / "results.json").read_text())) == {"problems", "greedy"}
    assert evaluate(config, "--greedy", "null", "--out", tmp_path / "search") == 0
    assert set(json.loads((tmp_path / "search" / "results.json").read_text())) == {"problems", "rollouts"}
