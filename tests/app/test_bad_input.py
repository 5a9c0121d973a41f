"""Wrong usages: one line that says what is wrong, exit 2, no traceback."""

import json
import shutil
from pathlib import Path

import pytest

from rftt_lightning.app.cli import main
from rftt_lightning.core.paths import resolve

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "configs/tiny"
BASE = resolve("pkg:tiny/checkpoints/countdown")
SEARCH = ["search", f"--config={TINY / 'search.yaml'}", "--source.init_args.count=2"]
EVALUATE = [
    "evaluate",
    f"--config={TINY / 'evaluate.yaml'}",
    "--source.init_args.count=2",
    f"--backend.init_args.model={BASE}",
]
CURATE = ["curate", f"--config={TINY / 'curate.yaml'}"]
SFT = ["sft", "fit", f"--config={TINY / 'sft.yaml'}"]
RL = ["rl", "fit", f"--config={TINY / 'rl.yaml'}", f"--model.model={BASE}"]


@pytest.fixture
def files(tmp_path: Path) -> Path:
    (tmp_path / "bad.jsonl").write_text('{"question": "1+1", "answer": "#### 2"}\n{"question": \n')
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "file").write_text("")
    (tmp_path / "bad.yaml").write_text("source: [unclosed")
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "manifest.json").write_text(json.dumps({"kind": "trajectories", "settings": {}}))
    mixed = tmp_path / "mixed"
    shutil.copytree(BASE, mixed)
    words = json.loads((mixed / "tokenizer.json").read_text())
    words["model"]["vocab"]["extra"] = 5000
    (mixed / "tokenizer.json").write_text(json.dumps(words))
    return tmp_path


def gsm8k(path: str) -> list[str]:
    return ["--source.class_path=rftt_lightning.search.problems.GSM8K", f"--source.init_args.path={path}"]


@pytest.mark.parametrize(
    "args, words",
    [
        (["serch"], ["serch"]),
        ([*SEARCH, "--nonsense=1"], ["nonsense"]),
        ([*SEARCH, "--seed=three"], ["seed"]),
        ([*SEARCH, "--config=@/nowhere.yaml"], ["nowhere.yaml"]),
        ([*SEARCH, "--config=@/bad.yaml"], ["bad.yaml is no YAML", "line 1"]),
        ([*RL, "--config=@/bad.yaml"], ["bad.yaml is no YAML"]),
        ([*SEARCH, "--backend.init_args.model=@/nothing"], ["nothing", "config.json"]),
        ([*SEARCH, "--backend.init_args.model=@/mixed"], ["mixed", "5000", "vocabulary"]),
        ([*SEARCH, "--out=@/file/below"], ["cannot write", "file"]),
        ([*SEARCH, "--source.init_args.split=exam"], ["split", "exam"]),
        ([*SEARCH, "--source.init_args.split=test", "--out=@/out"], ["overlap"]),
        ([*SEARCH, "--expander.init_args.prompts=@/store", "--out=@/out"], ["prompt"]),
        (["search", f"--config={TINY / 'search.yaml'}", *gsm8k("@/bad.jsonl"), "--out=@/out"], ["bad.jsonl", "2"]),
        (
            ["search", f"--config={TINY / 'search.yaml'}", *gsm8k("@/empty.jsonl"), "--out=@/out"],
            ["empty", "no problem"],
        ),
        ([*CURATE, "--trees=@/nowhere", "--out=@/out"], ["nowhere", "store"]),
        ([*CURATE, "--trees=@/store", "--out=@/out"], ["trajectories", "trees"]),
        ([*CURATE, "--curator.alpha=2", "--trees=@/store", "--out=@/out"], ["alpha"]),
        ([*EVALUATE, "--out=@/out"], ["functional token"]),
        ([*EVALUATE, "--rollouts=[32]", "--out=@/out"], ["32"]),
        ([*EVALUATE, "--greedy=null", "--search=null", "--out=@/out"], ["nothing to evaluate"]),
        ([*EVALUATE, "--backend.init_args.mask=[verfy]", "--out=@/out"], ["verfy"]),
        ([*SFT, "--data.folder=@/nowhere", "--out=@/out"], ["nowhere"]),
        ([*RL, "--trainer.out=@/file/below"], ["file"]),
        ([*RL, "--trainer.expander.init_args.mode=forest"], ["forest"]),
        ([*RL, "--trainer.greedy.init_args.max_tokens=0", "--trainer.out=@/out"], ["max_tokens is 0"]),
        ([*RL, "--trainer.callbacks.init_args.thresholds.window=1", "--trainer.out=@/out"], ["window=1"]),
        (["check", "@/nowhere.jsonl", "--output=@/out.jsonl"], ["nowhere.jsonl"]),
        (["tokens", "--model=@/nothing"], ["nothing"]),
        ([*SEARCH, "--backend.init_args.dtype=foo", "--out=@/out"], ["dtype is 'foo'", "float32"]),
        ([*SEARCH, "--backend.init_args.device=tpu", "--out=@/out"], ["device is 'tpu'", "auto"]),
        ([*EVALUATE, "--backend.init_args.device=cuda:99", "--out=@/out"], ["device is 'cuda:99'"]),
        ([*CURATE, "--backend.init_args.dtype=8bit", "--trees=@/store", "--out=@/out"], ["dtype is '8bit'"]),
        (["check", "--nonsense"], ["nonsense"]),
        (["check", "--explain", "1"], ["--explain", "two texts"]),
        (["check", "@/bad.jsonl", "--workers=0"], ["workers is 0", "at least 1"]),
        (["check", "@/bad.jsonl", "--workers=-1"], ["workers is -1"]),
        (["check", "--config=@/bad.yaml"], ["bad.yaml is no YAML"]),
        ([*SFT, "--ckpt_path=@/file", "--out=@/out"], ["file is no checkpoint"]),
        ([*SFT, "--seed_everything=-1", "--out=@/out"], ["seed_everything is -1"]),
        ([*RL, "--ckpt_path=@/store", "--trainer.out=@/out"], ["no checkpoint at", "store"]),
        ([*RL, "--model.lr=-1", "--trainer.out=@/out"], ["model.lr is -1"]),
        ([*RL, "--data.train.init_args={split: test, count: 50}", "--trainer.out=@/out"], ["overlap", "allow_overlap"]),
    ],
    ids=lambda value: " ".join(value)[-60:].replace("/", "_"),
)
def test_one_line_and_exit_2(files, capfd, args, words):
    status = main([arg.replace("@", str(files), 1) if "@" in arg else arg for arg in args])
    lines = [line for line in capfd.readouterr().err.splitlines() if line.startswith("rftt:")]
    assert status == 2, lines
    assert len(lines) == 1 and "Traceback" not in lines[0] and all(word in lines[0] for word in words), lines
