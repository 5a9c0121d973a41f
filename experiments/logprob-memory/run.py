"""What do the log-probabilities of written tokens cost, all logits at once or some at a time? Each measurement runs in a process of
its own: seconds, processor seconds, and by how much the peak resident memory lies above what was there before."""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rftt_lightning.policy import logprobs, objectives
from rftt_lightning.policy.vocab import masked_log_softmax

TOKENS = 1024
"""Tokens of a row."""


def status(field: str) -> float:
    """A line of /proc/self/status, in GiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 2**20


def inputs(rows: int, vocabulary: int, hidden: int) -> tuple[nn.Linear, Tensor, Tensor, Tensor, Tensor]:
    """Head, hidden states, tokens, grammar states, and what three states allow."""
    torch.manual_seed(0)
    count = rows * TOKENS
    head, hidden_NH = nn.Linear(hidden, vocabulary, bias=False), torch.randn(count, hidden, requires_grad=True)
    allowed_SV = torch.rand(3, vocabulary) < 0.9
    allowed_SV[:, : vocabulary // 2] = True
    return head, hidden_NH, torch.randint(vocabulary // 2, (count,)), torch.randint(3, (count,)), allowed_SV


def compute(kind: str, head: nn.Linear, hidden: Tensor, tokens: Tensor, states: Tensor, allowed: Tensor) -> Any:
    """Log-probabilities and entropy, and the gradients of a weighted sum of the former."""
    if kind == "dense":
        logp_NV = masked_log_softmax(head(hidden), states, allowed)
        logp, entropy = objectives.take(logp_NV, tokens), objectives.entropy(logp_NV.detach())
        del logp_NV
    else:
        logp, entropy = logprobs.written(head, hidden, tokens, states, allowed)
    (logp * torch.linspace(-1, 1, len(logp))).sum().backward()
    return logp.detach(), entropy, hidden.grad, head.weight.grad


def measure(kind: str, rows: int, vocabulary: int, hidden: int) -> dict[str, Any]:
    given = inputs(rows, vocabulary, hidden)
    if kind == "compare":
        one = compute("dense", *given)
        given[0].weight.grad = given[1].grad = None
        names = ("log-probability", "entropy", "gradient of hidden states", "gradient of the head")
        other = compute("chunked", *given)
        sizes = {
            n: float((a - b).abs().max() / b.abs().max().clamp(min=1))
            for n, a, b in zip(names, other, one, strict=True)
        }
        return {"rows": rows, "largest difference": sizes}
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    begin, used = time.monotonic(), time.process_time()
    compute(kind, *given)
    seconds = time.monotonic() - begin
    return {
        "kind": kind,
        "rows": rows,
        "seconds": round(seconds, 1),
        "cpu_seconds": round(time.process_time() - used, 1),
        "faults": resource.getrusage(resource.RUSAGE_SELF).ru_minflt,
        "peak_gib": round(status("VmHWM") - before, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", default="runs/logprob-memory")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--hidden", type=int, default=896)
    parser.add_argument("--dense", type=int, nargs="*", default=[1, 2, 4], help="rows; 8 take some 20 GiB")
    parser.add_argument("--chunked", type=int, nargs="*", default=[1, 2, 4, 8], help="rows")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "ROWS"), help="a single measurement, in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], int(args.one[1]), args.vocabulary, args.hidden)))
        return
    sizes = [f"--vocabulary={args.vocabulary}", f"--hidden={args.hidden}"]
    found = []
    for kind, rows in [("compare", 1), *(("dense", n) for n in args.dense), *(("chunked", n) for n in args.chunked)]:
        command = [sys.executable, __file__, *sizes, "--one", kind, str(rows)]
        found.append(json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
        print(found[-1], flush=True)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
