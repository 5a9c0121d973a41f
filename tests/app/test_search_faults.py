"""``rftt search`` is killed at any moment, again and again: no finished tree is lost or there twice, and the end is as if never killed."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.search.store import MANIFEST, read_trees, shards
from scripted import ScriptedBackend, ScriptedReward, ScriptedSource

COUNT, SHARD, KILLS = 160, 4, 20
SEARCH = f"""
import sys
from rftt_lightning.app import cli
from rftt_lightning.search import store
store.SHARD = {SHARD}
sys.exit(cli.main(["search", "--config", *sys.argv[1:]]))
"""


class Source(ScriptedSource):
    def __init__(self) -> None:
        super().__init__(COUNT)


class Paced(ScriptedBackend):
    """Slow enough to be killed in the midst of everything."""

    def __init__(self) -> None:
        super().__init__()

    def generate(self, requests):
        time.sleep(0.004)
        return super().generate(requests)


class Reward(ScriptedReward):
    def __init__(self) -> None:
        super().__init__()


def begin(config: Path, out: Path) -> subprocess.Popen:
    root = Path(__file__).resolve().parents[2]
    path = os.pathsep.join(map(str, (root, root / "tests", root / "tests" / "app")))
    command = [sys.executable, "-c", SEARCH, str(config), "--out", str(out)]
    return subprocess.Popen(
        command, env={**os.environ, "PYTHONPATH": path}, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )


def stored(out: Path) -> dict:
    """Trees by problem; fails if one is there twice or broken."""
    found = list(read_trees(out)) if (out / MANIFEST).exists() else []
    for tree in found:
        tree.check()
    assert len({tree.problem.id for tree in found}) == len(found)
    return {tree.problem.id: tree for tree in found}


@pytest.mark.slow
def test_killed_at_twenty_random_moments_it_ends_as_the_straight_run(tmp_path):
    prompts = tmp_path / "prompts"
    prompts.mkdir()
    for name in TokenTable.from_yaml().names:
        (prompts / f"{name}.txt").write_text(name)
    settings = {
        **{name: {"class_path": f"{__name__}.{name.title()}"} for name in ("source", "reward")},
        "backend": {"class_path": f"{__name__}.Paced"},
        "expander": {
            "class_path": "rftt_lightning.search.expand.PromptExpander",
            "init_args": {"prompts": str(prompts), "rollouts": 6},
        },
        "concurrency": 3,
    }
    config, straight, killed = tmp_path / "search.yaml", tmp_path / "straight", tmp_path / "killed"
    config.write_text(yaml.safe_dump(settings))
    process = begin(config, straight)
    assert process.communicate()[1] == "" and process.returncode == 0

    rng, known, left = random.Random(0), {}, set()
    for number in range(KILLS):
        aim, process = len(known) + rng.randint(0, 10), begin(config, killed)
        while process.poll() is None and len(shards(killed, "trees")) * SHARD < aim:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.1))
        process.kill()
        said = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, said
        left.update(path.suffix for path in killed.glob("trees-*"))
        now = stored(killed)
        assert known.items() <= now.items(), f"lost after kill {number}"
        known = now
    process = begin(config, killed)
    assert process.communicate()[1] == "" and process.returncode == 0
    assert stored(killed) == stored(straight) and len(stored(straight)) == COUNT
    assert [path.suffix for path in shards(killed, "trees")][:-1] == [".gz"] * (COUNT // SHARD)
    assert left >= {".gz", ".jsonl"}
