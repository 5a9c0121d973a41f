"""Each sickness rings its own alarm and no other, a healthy run rings none, and a resumed run has the alarms of a straight one."""

import json
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rftt_lightning.app.cli import main
from rftt_lightning.core.contracts import UserError
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.training import pictures
from rftt_lightning.training.diagnostics import (
    NAMES,
    SICKNESSES,
    Diagnosis,
    Diagnostics,
    Thresholds,
    diagnose,
    read_history,
)
from tests.sft_world import save_base
from tests.sick import ILL, Illness, grown, history

ROOT = Path(__file__).resolve().parents[2]
RECORDED = ROOT / "experiments/diagnostics/results"
HEALTHY = sorted(RECORDED.glob("healthy-*.jsonl"))


def names(rows, **limits):
    return [alarm.name for alarm in diagnose(rows, Thresholds(**limits)).alarms]


# -- what rings -------------------------------------------------------------------------------------------------------------


def test_every_sickness_has_a_case():
    assert {name for name, _ in ILL.values()} == set(NAMES)


@pytest.mark.slow
@pytest.mark.parametrize("case", ILL)
def test_a_sickness_rings_its_own_alarm_alone(case):
    name, illness = ILL[case]
    diagnosis = diagnose(history(illness))
    (alarm,) = diagnosis.alarms
    assert alarm.name == name and alarm.until is None and diagnosis.unseen() == []
    assert 5 <= alarm.since <= 12, "it fell ill at step 5"


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(2))
def test_a_policy_that_stays_as_it_is_rings_nothing(seed):
    assert names(history(lambda severity: Illness(), seed)) == []


@pytest.mark.parametrize("window", [5, 10])
@pytest.mark.parametrize("path", HEALTHY, ids=lambda path: path.stem)
def test_recorded_healthy_runs_ring_nothing(path, window):
    rows = read_history(path)
    assert len(rows) >= 2 * window and names(rows, window=window) == []


def test_there_are_three_healthy_seeds():
    assert len(HEALTHY) == 3


def test_the_recorded_gameable_prm_rings_its_own_alarm_alone():
    diagnosis = diagnose(read_history(RECORDED / "gaming-0.jsonl"))
    (alarm,) = diagnosis.alarms
    assert (alarm.name, alarm.until) == ("prm_gaming", None) and alarm.symptoms == (
        "reward_without_accuracy",
        "length_growth",
    )


def test_a_recorded_prm_that_comes_to_score_checks_higher_rings_though_its_reward_is_centred():
    rows = read_history(RECORDED / "own-prm-1.jsonl")
    (alarm,) = diagnose(rows).alarms
    assert (alarm.name, alarm.until, alarm.symptoms) == ("prm_gaming", None, ())
    assert "score of it 0.32" in alarm.evidence
    paid = {"rewards/verify": rows[0]["rewards/verify"]}  # as many checks for the same pay are none of it
    for name in ("repair/net", "step_scores/verify"):  # each alone is none
        assert names([row | paid | {name: rows[0][name]} for row in rows]) == []


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("path", HEALTHY, ids=lambda path: path.stem)
def test_noise_does_not_ring(path, seed):
    """Healthy steps drawn anew from their neighbours, each number moved by a tenth, and a step in ten that is wild: at most three of
    them together."""
    rng = random.Random(seed)
    rows = read_history(path)
    shaken = []
    for step in range(len(rows)):
        row = rows[min(max(step + rng.randint(-2, 2), 0), len(rows) - 1)]
        wild = rng.choice((0.0, 3.0)) if step % 10 == 7 else 1.0
        moved = {k: v * wild * rng.uniform(0.9, 1.1) for k, v in row.items() if k not in ("step", "rollouts")}
        shaken.append({"step": step, "rollouts": row["rollouts"], **moved})
    assert names(shaken) == []


@pytest.mark.parametrize(("end", "rings"), [(0.97, []), (0.94, []), (0.8, ["reward_without_accuracy"])])
def test_a_run_that_begins_near_the_ceiling_is_healthy_if_it_stays_there(end, rings):
    """Its process reward rises, and its answers get shorter."""
    rng, rows = random.Random(0), []
    for step in range(40):
        done = min(step / 20, 1.0)
        right = sum(rng.random() < 0.97 + done * (end - 0.97) for _ in range(192))
        means = {"accuracy": right / 192, "reward": 1.2 + 0.6 * done, "length": 80.0 - 50.0 * done}
        rows.append({"step": step, "rollouts": 192.0, **means})
    assert names(rows) == rings


# -- beginning and end ------------------------------------------------------------------------------------------------------


def kl(*values):
    return [{"step": step, "kl": value} for step, value in enumerate(values)]


def test_an_alarm_begins_and_ends_after_patience_and_names_the_step():
    limits = Thresholds(window=2, patience=3)
    diagnosis = diagnose(kl(0, 0, 0, 2, 2, 2, 2), limits)  # the median of two exceeds 0.5 from step 3
    (alarm,) = diagnosis.alarms
    assert (alarm.name, alarm.since, alarm.until) == ("kl_explosion", 3, None)
    assert diagnose(kl(0, 0, 0, 2, 2, 2), limits).alarms == [alarm]
    assert diagnose(kl(0, 0, 0, 2, 2), limits).alarms == []
    over = diagnose(kl(0, 0, 0, 2, 2, 2, 0, 0, 0, 0), limits)
    assert [(a.since, a.until) for a in over.alarms] == [(3, 7)] and over.lasting == []
    again = diagnose(kl(0, 0, 0, 2, 2, 2, 0, 0, 0, 0, 2, 2, 2, 2), limits)
    assert [(a.since, a.until) for a in again.alarms] == [(3, 7), (10, None)]


def test_steps_that_do_not_measure_it_leave_an_alarm_as_it_is():
    """No step without rollouts to learn from has a KL; that is not a KL of 0."""
    rows = kl(*[2.0] * 12) + [{"step": step, "accuracy": 0.0} for step in range(12, 40)]
    (alarm,) = diagnose(rows).alarms
    assert (alarm.name, alarm.until) == ("kl_explosion", None)


def test_a_token_that_takes_all_where_none_stood_at_the_start():
    """Tags as text, no warm-up: the first window has no functional token."""
    diagnosis = Diagnosis(Thresholds(window=2, patience=1))
    for step, count in enumerate((0.0, 0.0, 3.0, 3.0)):
        diagnosis.tell({"step": step, "rollouts": 100.0, "accuracy": 0.5, "functional_tokens/next_step": count})
    (alarm,) = diagnosis.lasting
    assert alarm.name == "token_collapse" and alarm.evidence.endswith("100 % of the segments (0 % at the start)")


def test_tell_gives_what_begins_and_ends_once():
    diagnosis, rung = Diagnosis(Thresholds(window=2, patience=2)), []
    for row in kl(0, 0, 2, 2, 2, 2, 0, 0, 0, 0, 0):
        rung += [(alarm.name, alarm.until is not None) for alarm in diagnosis.tell(row)]
    assert rung == [("kl_explosion", False), ("kl_explosion", True)]


def clogged(dead: str, late: str):
    """Are all groups of a step dead, which a checker that comes too late explains? A rule holds at the second of two such steps."""
    for step, (d, t) in enumerate(zip(dead, late, strict=True)):
        groups = {"groups/mixed": 1.0 - int(d), "groups/all_right": float(d), "groups/all_wrong": 0.0}
        yield {"step": step, **groups, "rollouts": 100.0, "verdicts/timed_out": 9.0 * int(t)}


@pytest.mark.parametrize(
    ("dead", "late", "alarms"),
    [
        (
            "1" * 16,
            "0000111100001111",
            {("dead_groups", 1, None), ("checker_timeouts", 5, 8), ("checker_timeouts", 13, None)},
        ),
        ("1" * 10, "0110110110", {("dead_groups", 1, None)}),
        ("1" * 12, "1" * 12, {("checker_timeouts", 1, None)}),
        ("1" * 12, "111111000000", {("checker_timeouts", 1, 6), ("dead_groups", 1, None)}),
        ("111111000000", "1" * 12, {("checker_timeouts", 1, None)}),
        ("000011110000", "1" * 12, {("checker_timeouts", 1, None)}),
    ],
    ids=["explained once it rings", "by what never begins", "together", "cause over", "symptom over", "symptom later"],
)
def test_what_has_begun_explains_what_does_not_ring_yet(dead, late, alarms):
    """Momentary holds explain nothing, and an alarm that rings is over when its own rule is."""
    found = diagnose(clogged(dead, late), Thresholds(window=2, patience=3)).alarms
    assert len(found) == len(alarms) and {(a.name, a.since, a.until) for a in found} == alarms


@pytest.mark.filterwarnings("ignore:checker_timeouts")
def test_a_symptom_stops_the_run_too():
    stops, step = [], []
    writer = SimpleNamespace(add_text=lambda *_: None, add_scalar=lambda *_: None)
    trainer = SimpleNamespace(is_global_zero=True, logger=SimpleNamespace(experiment=writer))
    trainer.stop = lambda reason: stops.append((step[-1], reason))
    callback = Diagnostics(every=0, stop_on=["dead_groups"])
    callback.diagnosis = Diagnosis(Thresholds(window=2, patience=3))
    for row in clogged("000011110000", "1" * 12):
        step.append(row["step"])
        callback.on_step_end(trainer, None, row, [])
    ((when, reason),) = stops
    assert when == 7 and reason.startswith("stopped by stop_on of Diagnostics: dead_groups since step 5: all right")


def test_in_pieces_is_in_one():
    rows = read_history(RECORDED / "gaming-0.jsonl")
    whole = diagnose(rows)
    for cut in range(len(rows)):
        pieces = diagnose(rows[:cut])
        for row in rows[cut:]:
            pieces.tell(row)
        assert pieces.alarms == whole.alarms


def test_what_is_not_measured_is_said():
    assert diagnose(kl(0.0)).unseen() == [s.name for s in SICKNESSES if s.needs != ("kl",)]


@pytest.mark.parametrize(
    "settings", [{"window": 1}, {"patience": 0}, {"kl": 0}, {"longer": 1.0}, {"late": 1.0}, {"gain": float("nan")}]
)
def test_thresholds_out_of_range_are_refused(settings):
    with pytest.raises(UserError, match="thresholds"):
        Thresholds(**settings)


def test_settings_of_the_callback_are_checked():
    with pytest.raises(UserError, match="'kl'; use some of token_collapse, kl_explosion"):
        Diagnostics(stop_on=["kl"])
    with pytest.raises(UserError, match="every is -1"):
        Diagnostics(every=-1)


# -- in a run, and after it -------------------------------------------------------------------------------------------------


def run(out: Path, base: str, steps: int, *more: str) -> int:
    """A real run in the world of guesses, with a PRM that likes every check."""
    small = ["init_args.max_tokens=40", "init_args.max_depth=8", "init_args.rollouts=4"]
    sampling = ["init_args.sampling.max_segment_tokens=20", "init_args.sampling.min_prior=0"]
    return main(
        [
            *(
                "rl",
                "fit",
                f"--config={ROOT / 'configs/tiny/rl.yaml'}",
                f"--model.model={base}",
                f"--trainer.out={out}",
            ),
            *("--data.train=tests.sick.Guess", "--data.train.init_args.start=0", "--data.train.init_args.count=150"),
            *("--data.validation=tests.sick.Guess", "--data.validation.init_args.start=200"),
            *("--data.validation.init_args.count=2", "--data.held_out=[]", "--data.batch_size=8", "--model.lr=0.004"),
            *(f"--trainer.max_steps={steps}", "--trainer.validate_every=100", "--trainer.checkpoint_every=100"),
            *(f"--trainer.expander.{option}" for option in (*small, *sampling)),
            "--trainer.reward=tests.sick.GameablePRM",
            *more,
        ]
    )


@pytest.mark.slow
def test_a_sickness_stops_the_run_and_a_second_start_goes_on(tmp_path, capfd):
    """All answers are wrong, so that all groups are dead from the first window, steps 0 to 4, and ring five steps later."""
    base, out = save_base(tmp_path / "base"), tmp_path / "run"
    ill = ["--data.train.init_args.share=0.0", "--trainer.callbacks.init_args.every=4"]
    stop = "--trainer.callbacks.init_args.stop_on=[dead_groups]"
    with pytest.warns(UserWarning, match="dead_groups since step 4"):
        assert run(out, base, 20, *ill, stop) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rftt:")]
    assert "stopped by stop_on of Diagnostics: dead_groups since step 4: all right 0" in line
    assert len(read_history(out / "metrics.jsonl")) == 9 and (out / "checkpoints/step-000009.pt").is_file()
    assert run(out, base, 10, *ill, stop) == 0, "what had begun does not stop it again"
    assert len(read_history(out / "metrics.jsonl")) == 10
    events = EventAccumulator(str(out), size_guidance={"scalars": 0, "images": 0}).Reload()
    assert [event.value for event in events.Scalars("alarms/dead_groups")] == [0.0] * 8 + [1.0] * 2
    assert [event.value for event in events.Scalars("alarms/kl_explosion")] == [0.0] * 10
    drawn = {"trees/transitions", "trees/shapes", "trees/repairs", "paths/0", "paths/1", "paths/2"}
    assert drawn <= set(events.Tags()["images"])
    assert main(["diagnose", str(out)]) == 3
    assert "dead_groups" in capfd.readouterr().out


def test_a_setting_that_is_none_is_refused(tmp_path, capfd):
    assert run(tmp_path / "run", "x", 1, "--trainer.callbacks.init_args.thresholds.no_such=1") == 2
    assert "no_such" in capfd.readouterr().err


def test_the_command_prints_the_evidence_and_says_by_its_status_whether_one_lasts(capfd, tmp_path):
    def folder(name, rows):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    healthy = folder("healthy", read_history(HEALTHY[0]))
    assert main(["diagnose", healthy]) == 0
    assert "40 steps, alarms: 0 last, 0 over" in capfd.readouterr().out
    assert main(["diagnose", healthy, "--thresholds.kl=0.01"]) == 3
    assert "kl_explosion" in capfd.readouterr().out
    config = {"class_path": "x.Diagnostics", "init_args": {"thresholds": {"kl": 0.01}}}
    Path(healthy, "config.yaml").write_text(json.dumps({"trainer": {"callbacks": [config]}}))
    assert main(["diagnose", healthy]) == 3, "the run's own thresholds"
    assert main(["diagnose", folder("gaming", read_history(RECORDED / "gaming-0.jsonl"))]) == 3
    said = capfd.readouterr().out
    assert "prm_gaming" in said and "repairs" in said and "process_weight" in said


@pytest.mark.parametrize("text", [None, "", '{"step": 0', "[1]\n", '{"kl": 1.0}\n', '{"step": "a"}\n'])
def test_the_command_refuses_what_is_no_run(tmp_path, capfd, text):
    if text is not None:
        (tmp_path / "metrics.jsonl").write_text(text)
    assert main(["diagnose", str(tmp_path)]) == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert str(tmp_path / "metrics.jsonl") in line


def test_the_command_refuses_thresholds_out_of_range(capfd):
    for options in (["--thresholds.window", "-1"], ["--thresholds={kl: 0}"]):
        assert main(["diagnose", str(RECORDED), *options]) == 2
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith("rftt: thresholds")


def test_a_torn_last_line_is_left_out(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 0, "kl": 1.0}\n{"step": 1, "k')
    assert read_history(tmp_path / "m.jsonl") == [{"step": 0, "kl": 1.0}]


def test_reading_alarms_needs_no_torch():
    code = "import sys, rftt_lightning.app.diagnose; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


# -- pictures ---------------------------------------------------------------------------------------------------------------


def test_transitions_are_shares_of_what_followed():
    trees = grown(0, 0, repr(({}, 1.0, 0.25, 0.4, {}, 0.0)))
    table = TokenTable.from_yaml()
    axes = pictures.transitions(trees, table).axes[0]
    shown = axes.images[0].get_array()
    rows = ["question", *(n for n in table.names if not table.terminal(n))]
    for y, after in enumerate(rows):
        followers = [
            path.segments[i].tag
            for tree in trees
            for path in tree.rollouts()
            for i in range(len(path.segments))
            if (path.segments[i - 1].tag if i else "question") == after
        ]
        for x, name in enumerate(table.names):
            if name in table.legal(after):
                assert shown[y, x] == pytest.approx(followers.count(name) / max(len(followers), 1))
            else:
                assert shown.mask[y, x] if hasattr(shown, "mask") else shown[y, x] != shown[y, x]


def test_a_path_is_drawn_in_the_colours_of_its_tokens():
    table = TokenTable.from_yaml()
    rollout = grown(0, 0, repr(({}, 1.0, 0.25, 0.4, {}, 0.0)))[0].rollouts()[0]
    figure = pictures.path(rollout, table)
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert [t for t in texts if t in table.names] == [segment.tag for segment in rollout.segments]
    assert pictures.path(rollout, table, width=5, lines=4).get_figheight() < figure.get_figheight() + 2
