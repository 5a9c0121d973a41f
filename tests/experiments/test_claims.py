"""The claims' arms run, and their table says what the answers say."""

import importlib.util
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForTokenClassification

from rftt_lightning.app.cli import main
from rftt_lightning.core.contracts import Problem, Rollout, Score, Segment, Status, Verdict
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Plan, Tree
from rftt_lightning.policy.vocab import add_functional_tokens, save
from rftt_lightning.policy.vocab import load as load_model
from rftt_lightning.search.store import Store
from rftt_lightning.tiny.countdown import Countdown

ROOT = Path(__file__).resolve().parents[2]


def load(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / f"experiments/claims/{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


table, plot = load("table"), load("plot")


def answers(*shares, problems=200, seed=0):
    """So large a share of right answers in each seed."""
    rng = np.random.default_rng(seed)
    right_SP = np.stack([rng.permutation(np.arange(problems) < share * problems) for share in shares]).astype(float)
    return tally(right_SP, np.ones_like(right_SP))


def tally(right_SP, count_SP):
    return table.Tally(tuple(f"p{i}" for i in range(right_SP.shape[1])), right_SP, count_SP)


@pytest.mark.parametrize(
    "first, second, helps, verdict",
    [
        ((0.6, 0.62, 0.58), (0.3, 0.3, 0.3), True, "supports"),
        ((0.3, 0.3, 0.3), (0.6, 0.62, 0.58), True, "contradicts"),
        ((0.5, 0.52, 0.48), (0.5, 0.5, 0.5), True, "no difference seen"),
        ((0.9, 0.9, 0.4), (0.5, 0.5, 0.5), True, "no difference seen"),  # the seeds do not agree
        ((0.5, 0.52, 0.48), (0.5, 0.5, 0.5), False, "not shown"),  # too few to tell
        ((0.49, 0.48, 0.5), (0.5, 0.5, 0.5), True, "no difference seen"),
        ((0.9,), (0.5,), True, "one seed"),
        ((0.2, 0.2, 0.2), (0.5, 0.5, 0.5), False, "supports"),  # a control may do harm
        ((0.8, 0.8, 0.8), (0.5, 0.5, 0.5), False, "contradicts"),
    ],
)
def test_a_verdict_needs_an_interval_and_seeds_that_agree(first, second, helps, verdict):
    found = table.difference(answers(*first), answers(*second, seed=1))
    assert found.verdict(helps) == verdict
    assert found.mean == pytest.approx(np.mean(first) - np.mean(second))
    assert found.seeds == pytest.approx(np.subtract(first, second))
    assert found.low <= found.mean <= found.high


def test_arms_that_answered_other_problems_are_not_compared(tmp_path):
    one, other = answers(0.5, 0.5), answers(0.5, 0.5, problems=300)
    for first, second in ((one, other), (one, one._replace(problems=other.problems[-200:]))):
        with pytest.raises(SystemExit, match="different problems"):
            table.difference(first, second)
    with pytest.raises(SystemExit, match="holds no seed"):
        table.Sweep(tmp_path)


def spread(found):
    return found.high - found.low


def test_the_interval_is_that_of_problems_and_seeds():
    """That of a plain t-test where only seeds differ, or only problems; pairs of equal answers leave no doubt."""
    one = answers(0.5, 0.5, 0.5)
    assert table.difference(one, one)[:3] == (0, 0, 0)
    shares = (0.4, 0.6, 0.8)
    torn = table.difference(answers(*shares), one)
    assert spread(torn) == pytest.approx(2 * 4.303 * np.std(shares, ddof=1) / np.sqrt(3), rel=0.02)
    right_P = answers(0.6).right_SP[0]
    none = tally(np.zeros((3, 200)), np.ones((3, 200)))
    same = table.difference(tally(np.stack([right_P] * 3), none.count_SP), none)
    assert spread(same) == pytest.approx(2 * 1.972 * right_P.std(ddof=1) / np.sqrt(200), rel=0.001)


@pytest.mark.parametrize("of_seeds, of_problems, of_rest", [(0.0, 0.3, 0.5), (0.04, 0.3, 0.5), (0.1, 0.1, 0.3)])
def test_the_interval_holds_the_truth_in_95_of_100_cases(of_seeds, of_problems, of_rest):
    rng, held = np.random.default_rng(0), 0
    for _ in range(400):
        parts = of_seeds * rng.standard_normal((3, 1)), of_problems * rng.standard_normal((1, 100))
        gain_SP = sum(parts) + of_rest * rng.standard_normal((3, 100))
        none = tally(np.zeros((3, 100)), np.ones((3, 100)))
        found = table.difference(tally(gain_SP, none.count_SP), none)
        held += found.low <= 0 <= found.high
    assert 0.92 <= held / 400 <= 0.99


def test_shares_of_steps_are_weighed_by_their_number():
    """Problems with many steps count as often; each seed's share counts once; what agrees in each problem leaves no doubt."""
    count_SP = np.array([[1.0, 4, 0, 3] * 50, [2.0, 0, 0, 0] * 50])
    half = tally(count_SP / 2, count_SP)
    right_SP = np.array([[1.0, 0, 0, 3] * 50, [2.0, 0, 0, 0] * 50])
    other = tally(right_SP, count_SP)
    assert table.difference(half, half)[:3] == (0, 0, 0)
    found = table.difference(half, other)
    assert found.seeds == pytest.approx((1 / 2 - 4 / 8, 1 / 2 - 1)) and found.mean == pytest.approx(-0.25)
    assert found.low < -0.25 < found.high


def answer(problem: Problem, *steps: tuple[str, str], right: bool, closed: bool = True) -> Tree:
    """A tree with one path."""
    tree, node = Tree(problem, (1,)), 0
    for i, (tag, text) in enumerate(steps):
        (node,) = tree.plan(node, [Plan(tag, 1.0)])
        whole = closed or i < len(steps) - 1
        tree.fill(node, Segment(tag, (2, 3), (-1.0, -1.0), (0, 0), text, whole))
    tree.end(node, complete=closed)
    verdict = Verdict(Status.RIGHT if right else Status.WRONG)
    tree.hold(node, 0)
    tree.backup(node, Score(verdict, float(right), (0.0,) * len(steps)))
    return tree


PROBLEM = Problem("countdown/3-7-12=9", "3 7 12 target 9", "9", data={"numbers": [3, 7, 12], "target": 9})
WRONG, RIGHT = ("direct_answer", "3 + 7 = 10 , 12 - 10 = 2"), ("refine", "3 * 7 = 21 , 21 - 12 = 9")
MENDED = answer(
    PROBLEM,
    WRONG,
    ("verify", "2 , 9 ; wrong"),
    RIGHT,
    ("verify", "8 , 9 ; wrong"),
    ("output", "3 * 7 = 21 , 21 - 12 = 9"),
    right=True,
)
CUT = answer(PROBLEM, WRONG, ("verify", "2 , 9 ; wrong"), ("refine", "3 +"), right=False, closed=False)


AGAIN = answer(
    PROBLEM,
    ("next_step", "3 + 7 = 10 ; 10 12"),
    ("next_step", "12 - 10 = 2 ; 2"),
    ("verify", "2 , 9 ; wrong"),
    ("refine", "3 + 7  = 10 ; 10 12"),
    ("next_step", "12 - 10 = 2 ; 2"),
    ("verify", "2 , 9 ; wrong"),
    ("refine", "3 * 7 = 21 ; 12 21"),
    ("next_step", "21 - 12 = 9 ; 9"),
    ("output", "3 * 7 = 21 , 21 - 12 = 9"),
    right=True,
)


def test_what_is_repeated_is_not_new():
    """The first refine is the step just refuted, and leads to the same attempt; the second leads to another."""
    found = table.judged(AGAIN.rollouts()[0], Countdown())
    assert found["refine new"] == (1, 2) and found["attempt new"] == (2, 3) and found["output new"] == (0, 0)


def test_a_step_that_the_budget_cut_is_none():
    found = table.judged(CUT.rollouts()[0], Countdown())
    assert found["refine"] == (0, 0) == found["refine new"] and found["verify"] == (1, 1)


def test_the_mechanism_counts_what_a_loop_counts(monkeypatch):
    monkeypatch.setattr(table, "FEW", 1)
    rollouts: list[Rollout] = [MENDED.rollouts()[0], CUT.rollouts()[0]]
    found = table.mechanism(rollouts, Countdown())
    assert found == {
        "tokens": 8.0,
        "unfinished": 0.5,
        "malformed": 1 / 8,
        "verify": 1.5,
        "refine": 1.0,
        "first attempt": 0.0,
        "mended": 0.5,
        "spoilt": 0.0,
        "direct_answer right": 1.0,
        "verify right": 2 / 3,
        "refine right": 1.0,
        "output right": 1.0,
        "refine new": 1.0,
        "attempt new": 1.0,
    }
    monkeypatch.setattr(table, "FEW", 3)
    shares = {key for key in table.mechanism(rollouts, Countdown()) if key.endswith((" right", " new"))}
    assert shares == {"verify right"}  # of three


def test_p_values_of_a_table_are_holms():
    assert table.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert table.holm([0.9, 0.6]) == [1.0, 1.0] and table.holm([]) == []


def test_the_p_value_is_that_of_the_interval():
    """On the border of the interval it is 0.05; equal arms have 1."""
    one, other = answers(0.6, 0.62, 0.58), answers(0.5, 0.5, 0.5, seed=1)
    found = table.difference(one, other)
    border = table.difference(one._replace(right_SP=one.right_SP - found.low), other)
    assert border.low == pytest.approx(0) and border.p == pytest.approx(0.05)
    assert table.difference(one, one).p == 1


HONEST, LYING = ("verify", "2 , 9 ; wrong"), ("verify", "2 , 9 ; ok")


def evaluated(folder: Path, right: list[bool], finished: bool = True, checks: int = 0) -> None:
    """``checks`` verdicts an answer, of which those of right answers are honest."""
    store = Store(folder / "greedy", "trees", {})
    for i, good in enumerate(right):
        problem = Problem(f"p{i}", PROBLEM.question, PROBLEM.answer, data=PROBLEM.data)
        tree = answer(problem, WRONG, *[HONEST if good else LYING] * checks, ("output", "x"), right=good)
        store.add(problem.id, tree.to_json())
    store.close()
    if finished:
        (folder / "results.json").write_text("{}")


def test_the_table_pairs_arms_by_problem_and_leaves_out_what_was_not_run(tmp_path, capsys, monkeypatch):
    evaluated(tmp_path / "evaluate_base", [False] * 20)
    for seed, gain in ((0, 12), (1, 14)):
        evaluated(tmp_path / f"seed-{seed}" / "evaluate_sft", [i < 4 for i in range(20)])
        evaluated(tmp_path / f"seed-{seed}" / "evaluate_rl", [i < gain for i in range(20)])
        evaluated(tmp_path / f"seed-{seed}" / "evaluate_orm", [True] * seed, finished=seed == 0)  # under way
    seconds = {"seed-0/evaluate_rl": 90.0, "evaluate_base": 30.0}
    (tmp_path / "stages.json").write_text(json.dumps({"seconds": seconds, "total": 100.0, "done": {}}))
    monkeypatch.setattr("sys.argv", ["table.py", str(tmp_path)])
    table.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0].strip("| ") for line in lines[2:4]] == [table.CLAIMS[0].text, table.CLAIMS[1].text]
    assert "| +45.0 |" in lines[3] and "+40.0, +50.0 | " in lines[3] and "| supports |" in lines[3] and lines[4] == ""
    data = json.loads((tmp_path / "claims.json").read_text())
    assert [claim["mean"] for claim in data["claims"]] == pytest.approx([0.2, 0.45])
    assert data["arms"]["rl"]["accuracy"] == [0.6, 0.7] and set(data["arms"]) == {"base", "sft", "rl"}
    names = sorted(f"p{i}" for i in range(20))
    assert data["arms"]["sft"]["right"] == ["".join("01"[name in ("p0", "p1", "p2", "p3")] for name in names)] * 2
    assert data["cost"]["minutes of runs"] == 2.0 and data["cost"]["longest"] == "seed-0/evaluate_rl"
    assert "minutes of the longest 2" in lines[-2]
    assert (tmp_path / "claims.md").read_text().startswith("| claim |")
    assert data["majority"] == {}


def test_votes_are_tabled_by_the_number_of_rollouts(tmp_path):
    for seed in (0, 1):
        folder = tmp_path / f"seed-{seed}" / "evaluate_rl"
        evaluated(folder, [True] * 4)
        shutil.copytree(folder / "greedy", folder / "search")
        rows = {n: {"majority": {"accuracy": share + seed / 10}} for n, share in (("1", 0.5), ("16", 0.75))}
        (folder / "results.json").write_text(json.dumps({"rollouts": rows}))
    data = table.measure(table.Sweep(tmp_path), Countdown())
    text = table.tables(data)
    assert data["majority"] == {"rl": {"1": [0.5, 0.6], "16": [0.75, 0.85]}}
    assert text.splitlines()[-3:] == [
        "| majority of n rollouts | 1 | 16 |",
        "| --- | --- | --- |",
        "| rl | 50.0, 60.0 | 75.0, 85.0 |",
    ]


@pytest.mark.parametrize("checks, asked", [(3, True), (2, False)])
def test_a_claim_of_steps_is_about_the_checker_and_needs_enough_of_them(tmp_path, checks, asked):
    """Twenty answers with three checks each are more than table.FEW, with two they are not."""
    for seed in (0, 1):
        evaluated(tmp_path / f"seed-{seed}" / "evaluate_rl", [i < 18 + seed for i in range(20)], checks=checks)
        evaluated(tmp_path / f"seed-{seed}" / "evaluate_orm", [i < 8 for i in range(20)], checks=checks)
    data = table.measure(table.Sweep(tmp_path), Countdown())
    found = {claim["steps"]: claim for claim in data["claims"]}
    assert set(found) == ({"", "verify"} if asked else {""})
    if asked:
        assert found["verify"]["seeds"] == pytest.approx((0.5, 0.55)) and found["verify"]["verdict"] == "supports"
    shares = [seed.get("verify right") for seed in data["arms"]["rl"]["seeds"]]
    assert shares == (pytest.approx([0.9, 0.95]) if asked else [None, None])


@pytest.mark.parametrize("overlay", ["", "sweep_arithmetic", "sweep_countdown4"])
def test_each_command_of_a_world_is_understood(overlay, monkeypatch, capsys):
    """The configs that a plan names are there for that world, and have what the plan sets."""
    monkeypatch.chdir(ROOT)
    names = ["sweep", overlay] if overlay else ["sweep"]
    plan = [
        "sweep",
        *(f"--config=experiments/claims/{name}.yaml" for name in names),
        "--seeds=[0]",
        "--plan=true",
        "--only=[]",
    ]
    assert main(plan) == 0
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines()]
    assert {command[0] for command in commands} == {"rftt", "python"} and len(commands) > 30
    for program, *args in commands:
        if program == "python":
            assert Path(args[0]).exists()
            continue
        with pytest.raises(SystemExit) as stop:
            main([*args, "--print_config"])
        assert not stop.value.code, args
        capsys.readouterr()


@pytest.mark.slow
@pytest.mark.parametrize("arm", ["rejection", "random", "format_only", "no_checks", "text", "legal", "prm", "progress"])
def test_an_arm_trains(tmp_path, arm, monkeypatch):
    monkeypatch.chdir(ROOT)
    base = "pkg:tiny/checkpoints/countdown"
    args = ["rl", "fit", "--config=configs/tiny/rl.yaml", f"--config=experiments/claims/rl_{arm}.yaml"]
    args += [f"--model.model={base}", f"--trainer.out={tmp_path}", "--trainer.max_steps=2"]
    if arm in ("prm", "progress"):
        model, tokenizer = load_model(base, auto=AutoModelForTokenClassification, num_labels=2)
        add_functional_tokens(model, tokenizer, TokenTable.from_yaml())
        save(model, tokenizer, tmp_path / "prm")
        args += [f"--trainer.reward.init_args.process.init_args.scorer.init_args.model={tmp_path / 'prm'}"]
    args += ["--data.train.init_args.count=40", "--data.validation.init_args.count=8", "--data.batch_size=4"]
    args += ["--trainer.expander.init_args.rollouts=3", "--trainer.expander.init_args.max_tokens=40"]
    assert main(args) == 0
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("world", ["countdown", "arithmetic", "countdown4"])
def test_the_page_says_what_is_recorded(world):
    page = (ROOT / "experiments/claims/README.md").read_text().splitlines()
    data = json.loads((ROOT / f"experiments/claims/results/{world}.json").read_text())
    rows = table.tables(data).splitlines()
    assert len(data["claims"]) > 5 and not {*rows} - {*page, ""}


def test_the_picture_shows_each_recorded_claim_in_its_world(tmp_path, monkeypatch):
    folder = ROOT / "experiments/claims/results"
    claims = {path.stem: json.loads(path.read_text())["claims"] for path in sorted(folder.glob("*.json"))}
    figure = plot.draw({world: {claim["text"]: claim for claim in found} for world, found in claims.items()})
    assert [axis.get_title() for axis in figure.axes] == [*claims]
    texts = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    for axis, found in zip(figure.axes, claims.values(), strict=True):
        spans = {
            (texts[line.get_ydata()[0]], *line.get_xdata())
            for line in axis.lines
            if len(line.get_xdata()) == 2 and line.get_ydata()[0] == line.get_ydata()[1] and line.get_linewidth() == 2
        }
        assert spans == {(claim["text"], 100 * claim["low"], 100 * claim["high"]) for claim in found}
    assert {*plot.PAPER} <= {claim.text for claim in table.CLAIMS}
    monkeypatch.setattr(
        "sys.argv", ["plot.py", *map(str, sorted(folder.glob("*.json"))), "--out", str(tmp_path / "x.png")]
    )
    plot.main()
    assert (tmp_path / "x.png").stat().st_size > 10_000
