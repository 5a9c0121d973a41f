"""Choose the strongest of several models on validation problems: ``choose.py --out runs/best runs/sft runs/sft_long``.

Writes ``choice.json`` with the accuracy of each, and the best one's model as ``hf``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

from rftt_lightning.app.cli import main as rftt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--world", type=Path, default=Path("configs/tiny"), help="folder with evaluate.yaml")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("runs", type=Path, nargs="+", help="folders with a model in hf/")
    options = parser.parse_args()
    found = {}
    for run in options.runs:
        place = options.out / run.name
        args = ["evaluate", "--config", options.world / "evaluate.yaml", "--source.init_args.split", "validation"]
        args += ["--backend.init_args.model", run / "hf", "--search", "null", "--out", place]
        if status := rftt(list(map(str, args))):
            raise SystemExit(status)
        found[run.name] = json.loads((place / "results.json").read_text())["greedy"]["accuracy"]
    best = max(options.runs, key=lambda run: found[run.name])  # of equals the first
    shutil.rmtree(options.out / "hf", ignore_errors=True)
    shutil.copytree(best / "hf", options.out / "hf")
    (options.out / "choice.json").write_text(json.dumps({"best": best.name, "validation": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
