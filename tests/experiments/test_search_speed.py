"""The speed experiment in small: every engine grows the same trees, and all its figures are there."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "experiments" / "search-speed"
ENGINES = ("released", "generate", "no reuse", "ours")

spec = importlib.util.spec_from_file_location("search_speed_run", FOLDER / "run.py")
run = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = run
spec.loader.exec_module(run)


@pytest.mark.slow
def test_engines_agree_and_results_are_complete(tmp_path):
    # Not by run.sh, whose threads spin while they wait: a machine on which other tests run would stand still.
    env = {**os.environ, "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "KMP_BLOCKTIME": "0"}
    command = [sys.executable, FOLDER / "run.py", "--quick", "--threads=1", "--models=tiny", f"--out={tmp_path}"]
    env["PYTHONPATH"] = str(FOLDER.parents[1])
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, env=env, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    tiny = results["models"]["tiny"]
    assert {engine: found["trees"] for engine, found in tiny["trees_compared"].items()} == {
        "released": 2,
        "generate": 2,
        "no reuse": 2,
        "ours": 8,
    }
    for engine in ENGINES:
        figures = tiny["engines"][engine]
        assert figures["rollouts"] > 0 and figures["rollouts_per_min"] > 0 and figures["nodes_per_s"] > 0
        assert 0 < figures["occupancy"] <= 1 and figures["peak_MB"] > 0
        assert abs(sum(figures["shares"].values()) - 1) < 0.01
    by_tree = {engine: tiny["engines"][engine]["computed_per_useful"] for engine in ENGINES}
    assert by_tree["ours"] < by_tree["no reuse"] < by_tree["released"]
    assert results["occupancy"]["problems"] == 8 and 0 < results["overhead"]["python_outside_the_model"] < 1
    assert {"300", "1000", "profile"} == set(results["tree_logic"])
    assert (tmp_path / "table.md").read_text().count("\n") == 2 + len(ENGINES)
    assert (tmp_path / "speed.png").stat().st_size > 1000


def tree(tags=("question", "verify", "output"), tokens=(None, (1, 2), None), prior=0.25):
    return [-1, 0, 0], list(tags), list(tokens), [1, 1, 0], [0.5, 0.5, 0.0], [1.0, 0.25, prior]


def agree(other):
    found = {"ours": [{"trees": {0: tree(), 1: tree()}}], "released": [{"trees": {1: other}}]}
    return run.agree("tiny", found)["released"]


def test_an_engine_whose_tree_differs_stops_the_run_unless_it_is_a_near_tie():
    assert agree(tree()) == {"trees": 1, "near_ties": 0}
    assert agree(tree(prior=0.2500001)) == {"trees": 1, "near_ties": 0}  # rounding that changed nothing
    swapped = ("question", "output", "verify")
    assert agree(tree(swapped, (None, (3, 2), None))) == {"trees": 1, "near_ties": 1}
    for other in (tree(tokens=(None, (1, 3), None)), tree(("question", "verify", "refine"), prior=0.26)):
        with pytest.raises(SystemExit, match="problem 1 differs between released and ours"):
            agree(other)


def test_the_synthetic_tree_keeps_every_invariant():
    tree = run.synthetic(500)
    tree.check()
    assert 500 <= sum(segment is not None for segment in tree.segments) < 518
    assert max(len(tree.path(node)) for node in range(len(tree))) <= 18
