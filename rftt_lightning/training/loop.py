"""The Fabric loop of RL: roll out -> score -> batch -> learn -> bump the policy version -> log, validate, save."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from lightning import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import Tensor

from rftt_lightning.core.contracts import Problem, ProblemSource, Provenance, Reward, Rollout, Status, UserError
from rftt_lightning.core.tree import Tree
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.policy.rewards import Confidence
from rftt_lightning.search import driver
from rftt_lightning.search.expand import Expander, seed_of
from rftt_lightning.search.vote import Accuracy
from rftt_lightning.training.problems import ProblemDataModule
from rftt_lightning.training.rl import MEASURED, RLBatch, RLModule, collate


class RLTrainer:
    """Trainer of ``rftt rl``: interleaves tree search with REINFORCE++ updates.

    Args:
        expander: how rollouts are made.
        reward: what they are worth.
        greedy: how validation answers are made; null leaves validation out.
        out: folder of the run: config.yaml, metrics.jsonl, TensorBoard events, checkpoints/, hf/.
        max_steps: steps; each rolls out one batch of problems and learns from it.
        mini_batches: optimizer updates a step; epochs: passes over the rollouts.
        micro_batch: rollouts that go through the model at once when learning.
        gradient_clip: largest norm of the gradient.
        validate_every, checkpoint_every: steps; keep: checkpoints kept.
        concurrency, parallel, decode_batch: trees that grow together, rollouts under way in one, rows decoded together.
        seed: of everything; a step depends on it and on the step's number alone.
        accelerator, devices, num_nodes, strategy, precision: of Fabric. Weights are whole on each device.
        callbacks: objects whose ``on_step_end(trainer, module, metrics)`` is called after each step.
    """

    def __init__(
        self,
        expander: Expander,
        reward: Reward,
        greedy: Expander | None = None,
        out: str = "runs/rl",
        max_steps: int = 100,
        mini_batches: int = 1,
        epochs: int = 1,
        micro_batch: int = 64,
        gradient_clip: float = 1.0,
        validate_every: int = 10,
        checkpoint_every: int = 10,
        keep: int = 2,
        concurrency: int = 256,
        parallel: int = 1,
        decode_batch: int = 256,
        seed: int = 0,
        accelerator: str = "auto",
        devices: int | str = 1,
        num_nodes: int = 1,
        strategy: str = "auto",
        precision: str = "32-true",
        callbacks: list[Any] | None = None,
    ) -> None:
        for name in (
            "max_steps",
            "mini_batches",
            "epochs",
            "micro_batch",
            "validate_every",
            "checkpoint_every",
            "keep",
        ):
            if locals()[name] < 1:
                raise UserError(f"trainer.{name} is {locals()[name]}; it must be at least 1")
        self.expander, self.reward, self.greedy, self.out = expander, reward, greedy, Path(out)
        self.max_steps, self.mini_batches, self.epochs, self.micro_batch = max_steps, mini_batches, epochs, micro_batch
        self.gradient_clip, self.validate_every = gradient_clip, validate_every
        self.checkpoint_every, self.keep = checkpoint_every, keep
        self.concurrency, self.parallel, self.decode_batch, self.seed = concurrency, parallel, decode_batch, seed
        self.callbacks = callbacks or []
        self.logger = TensorBoardLogger(str(self.out), name="", version="")
        self.fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=precision,  # type: ignore[arg-type]
            loggers=self.logger,
            callbacks=self.callbacks,
        )
        self.stop_asked = False

    # what LightningCLI and its SaveConfigCallback ask of a trainer
    @property
    def log_dir(self) -> str:
        return str(self.fabric.strategy.broadcast(str(self.out)))

    @property
    def is_global_zero(self) -> bool:
        return self.fabric.is_global_zero

    @property
    def strategy(self) -> Any:
        return self.fabric.strategy

    # -- the loop --------------------------------------------------------------------------------------------------------

    def fit(self, model: RLModule, datamodule: ProblemDataModule, ckpt_path: str | None = None) -> None:
        """Train; goes on at the last checkpoint of ``out`` if there is one.

        Args:
            ckpt_path: a checkpoint to begin from; null is the newest one in ``out``, "none" begins anew.
        """
        self._launch(model, "fit")
        optimizer = model.configure_optimizers()
        module, optimizer = self.fabric.setup(model, optimizer)
        for reference in model._reference:
            reference.to(self.fabric.device)
        backend = HFBackend.live(model.model, model.tokenizer, model.table, self.decode_batch)
        first = self._resume(model, optimizer, ckpt_path)
        with _signals(self), self._progress() as bar:
            task = bar.add_task("rl", total=self.max_steps, completed=first, rates="")
            for step in range(first, self.max_steps):
                backend.version = step
                metrics = self._step(step, module, model, optimizer, backend, datamodule)
                if self.greedy and ((step + 1) % self.validate_every == 0 or step + 1 == self.max_steps):
                    metrics |= self._validate(step, backend, datamodule)
                self._log(step, metrics)
                self.fabric.call("on_step_end", trainer=self, module=model, metrics=metrics)
                bar.update(task, advance=1, rates=_rates(metrics))
                stop = bool(self.fabric.all_reduce(torch.tensor(float(self.stop_asked)), reduce_op="sum"))
                if stop or (step + 1) % self.checkpoint_every == 0 or step + 1 == self.max_steps:
                    self._save(step + 1, model, optimizer)
                if stop:
                    raise KeyboardInterrupt
        self._export(model)

    def validate(self, model: RLModule, datamodule: ProblemDataModule, ckpt_path: str | None = None) -> None:
        """Answer the validation problems greedily and print the accuracy.

        Args:
            ckpt_path: a checkpoint whose weights to take; null takes those of model.model.
        """
        if self.greedy is None:
            raise UserError("trainer.greedy is null: say how validation answers are made")
        self._launch(model, "validate")
        module = self.fabric.setup(model)
        if ckpt_path:
            self._resume(model, None, ckpt_path)
        backend = HFBackend.live(model.model, model.tokenizer, model.table, self.decode_batch)
        metrics = self._validate(0, backend, datamodule)
        self.fabric.print(json.dumps({name: round(value, 4) for name, value in metrics.items()}), type(module).__name__)

    def _launch(self, model: RLModule, stage: str) -> None:
        try:
            self.out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write to {self.out}: {error.strerror}; choose another trainer.out") from error
        self.fabric.launch()
        self.fabric.call("setup", trainer=self, pl_module=model, stage=stage)

    def _step(
        self,
        step: int,
        module: Any,
        model: RLModule,
        optimizer: Any,
        backend: HFBackend,
        data: ProblemDataModule,
    ) -> dict[str, float]:
        torch.manual_seed(seed_of(self.seed, step, "step"))
        times = [time.monotonic()]
        progress = driver.Progress()
        problems = data.batch(step)[self.fabric.global_rank :: self.fabric.world_size]
        if len(problems) < 1:
            raise UserError(f"data.batch_size is below the {self.fabric.world_size} devices; each needs a problem")
        trees = self._grow(
            problems, self.expander, self.reward, backend, data.train, seed_of(self.seed, step), progress
        )
        rollouts = [rollout for tree in trees for rollout in tree.rollouts()]
        times.append(time.monotonic())
        batch = collate(rollouts, model.vocabulary).to(self.fabric.device)
        batch = model.prepare(batch, self.micro_batch, self._sum)
        times.append(time.monotonic())
        learned = self._learn(step, module, model, optimizer, batch)
        times.append(time.monotonic())
        if self.is_global_zero:
            self._show(step, trees)
        return learned | self._measure(rollouts, batch, progress, times)

    def _grow(
        self,
        problems: Sequence[Problem],
        expander: Expander,
        reward: Reward,
        backend: HFBackend,
        source: ProblemSource,
        seed: int,
        progress: driver.Progress,
    ) -> list[Tree]:
        grown = driver.grow(
            problems,
            expander,
            backend,
            reward,
            source,
            seed=seed,
            concurrency=self.concurrency,
            parallel=self.parallel,
            progress=progress,
        )
        return [tree for _, tree in sorted(grown, key=lambda pair: pair[0])]

    def _learn(self, step: int, module: Any, model: RLModule, optimizer: Any, batch: RLBatch) -> dict[str, float]:
        """Shuffled mini-batches, one optimizer update each, accumulated over micro-batches."""
        rate = model.learning_rate(step, self.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums: Counter[str] = Counter()
        norms, updates = 0.0, 0
        model.train()
        for _ in range(self.epochs):
            for index in torch.randperm(len(batch)).tensor_split(self.mini_batches):
                mini = batch.rows(index.to(batch.tokens_BL.device))
                denominator = self._sum(model.weights(mini).sum()).clamp(min=1.0)
                parts = [part for _, part in mini.split(self.micro_batch)]
                total = torch.zeros(len(MEASURED), device=batch.tokens_BL.device)
                for number, micro in enumerate(parts):
                    with self.fabric.no_backward_sync(module, enabled=number < len(parts) - 1):
                        loss, measured = module(denominator, *micro.columns())
                        # ranks average their gradients, the denominator is global already
                        self.fabric.backward(loss * self.fabric.world_size)
                    total += measured
                sums.update(
                    dict(zip(MEASURED, self._sum(total).tolist(), strict=True))
                )  # ranks differ in micro-batches
                norm = self.fabric.clip_gradients(
                    module, optimizer, max_norm=self.gradient_clip, error_if_nonfinite=False
                )
                if not torch.isfinite(norm):
                    raise UserError(f"step {step}: the gradient is not finite, nothing was updated; lower model.lr")
                optimizer.step()
                optimizer.zero_grad()
                norms, updates = norms + float(norm), updates + 1
        return {name: value / updates for name, value in sums.items()} | {"grad_norm": norms / updates, "lr": rate}

    def _measure(
        self, rollouts: Sequence[Rollout], batch: RLBatch, progress: driver.Progress, times: Sequence[float]
    ) -> dict[str, float]:
        n = self._sum(torch.tensor(float(len(rollouts))))
        right = sum(r.score.verdict.right for r in rollouts if r.score)
        accuracy = Accuracy.of(int(self._sum(torch.tensor(float(right)))), int(n))
        tokens = self._sum(batch.mask_BT.sum())
        kl = self._sum(((batch.old_BT - batch.reference_BT) * batch.mask_BT).sum()) / tokens
        gap = (
            (batch.old_BT - batch.behaviour_BT).abs() * (batch.provenance_BT == int(Provenance.SAMPLED)) * batch.mask_BT
        )
        seconds = times[-1] - times[0]
        metrics = {
            "reward": float(self._sum(batch.rewards_BT.sum()) / n),
            "accuracy": accuracy.accuracy,
            "accuracy_low": accuracy.low,
            "accuracy_high": accuracy.high,
            "rollouts": float(n),
            "kl": float(kl),
            "length": float(tokens / n),
            "complete": float(self._sum(torch.tensor(float(sum(r.complete for r in rollouts)))) / n),
            "sampler_gap": float(self._sum(gap.sum()) / tokens),
            "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
            "seconds": seconds,
            "share_rollout": (times[1] - times[0] - progress.score_seconds) / seconds,
            "share_score": (times[2] - times[1] + progress.score_seconds) / seconds,
            "share_update": (times[3] - times[2]) / seconds,
        }
        use = Counter(segment.tag for rollout in rollouts for segment in rollout.segments)
        checked, correct = self._step_scores(rollouts)
        verdicts = progress.verdicts
        for name in self.expander.table.names:  # type: ignore[attr-defined]
            metrics[f"functional_tokens/{name}"] = float(self._sum(torch.tensor(float(use[name]))) / n)
            if scored := float(self._sum(torch.tensor(checked[name]))):
                metrics[f"step_scores/{name}"] = float(self._sum(torch.tensor(correct[name]))) / scored
        for status in Status:
            metrics[f"verdicts/{status.value}"] = float(self._sum(torch.tensor(float(verdicts[status]))))
        return metrics

    @staticmethod
    def _step_scores(rollouts: Sequence[Rollout]) -> tuple[dict[str, float], dict[str, float]]:
        """By functional token: how many segments the reward scored, and the sum of their scores."""
        counts: dict[str, float] = defaultdict(float)
        sums: dict[str, float] = defaultdict(float)
        for rollout in rollouts:
            for segment, score in zip(rollout.segments, rollout.score.steps if rollout.score else (), strict=False):
                if score is not None:
                    counts[segment.tag] += 1.0
                    sums[segment.tag] += score
        return counts, sums

    def _validate(self, step: int, backend: HFBackend, data: ProblemDataModule) -> dict[str, float]:
        problems = data.validation.problems()[self.fabric.global_rank :: self.fabric.world_size]
        progress = driver.Progress()
        trees = self._grow(problems, self.greedy, Confidence(), backend, data.validation, self.seed, progress)  # type: ignore[arg-type]
        answers = [tree.rollouts()[0] for tree in trees]
        right = sum(r.score.verdict.right for r in answers if r.score)
        counts = [float(right), float(len(answers)), float(sum(r.length for r in answers))]
        right, n, tokens = self._sum(torch.tensor(counts)).tolist()
        accuracy = Accuracy.of(int(right), int(n))
        for i, answer in enumerate(answers[:4] if self.is_global_zero else []):
            text = f"{answer.problem.question}\n\n{backend.tokens.render(answer.steps)}".replace("<", "&lt;")
            self.logger.experiment.add_text(f"validation/sample_{i}", text, step)
        return {
            "validation/accuracy": accuracy.accuracy,
            "validation/low": accuracy.low,
            "validation/high": accuracy.high,
            "validation/length": tokens / n,
        }

    # -- logging, saving -------------------------------------------------------------------------------------------------

    def _sum(self, value: Tensor) -> Tensor:
        if self.fabric.world_size == 1:
            return value
        return self.fabric.all_reduce(value.to(self.fabric.device), reduce_op="sum")  # type: ignore[return-value]

    def _log(self, step: int, metrics: dict[str, float]) -> None:
        if not self.is_global_zero:
            return
        self.logger.log_metrics(metrics, step)
        with (self.out / "metrics.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def _show(self, step: int, trees: Sequence[Tree]) -> None:
        """One tree and its first paths in TensorBoard, every ``validate_every`` steps."""
        if step % self.validate_every == 0:
            self.logger.experiment.add_text("tree", "<pre>" + trees[0].render().replace("<", "&lt;") + "</pre>", step)

    def _progress(self) -> Progress:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[rates]}"),
        )
        return Progress(*columns, disable=not self.is_global_zero)

    def _save(self, steps: int, model: RLModule, optimizer: Any) -> None:
        """Write a checkpoint whole or not at all, and forget the oldest."""
        if not self.is_global_zero:
            return
        folder = self.out / "checkpoints"
        folder.mkdir(exist_ok=True)
        path, temporary = folder / f"step-{steps:06d}.pt", folder / "writing.tmp"
        state = {
            "steps": steps,
            "seed": self.seed,
            "model": model.model.state_dict(),
            "optimizer": optimizer.state_dict(),
        }
        torch.save(state, temporary)
        temporary.replace(path)
        for old in sorted(folder.glob("step-*.pt"))[: -self.keep]:
            old.unlink()

    def _resume(self, model: RLModule, optimizer: Any, ckpt_path: str | None) -> int:
        """Load a checkpoint, cut metrics.jsonl back to it; returns the number of steps done."""
        metrics = self.out / "metrics.jsonl"
        newest = sorted((self.out / "checkpoints").glob("step-*.pt"))[-1:]
        path = Path(ckpt_path) if ckpt_path not in (None, "last", "none") else newest[0] if newest else None
        if ckpt_path == "none" or path is None:
            if ckpt_path == "none":
                shutil.rmtree(self.out / "checkpoints", ignore_errors=True)
            metrics.unlink(missing_ok=True)
            return 0
        state = torch.load(path, map_location=self.fabric.device, weights_only=True)
        if state["seed"] != self.seed:
            raise UserError(f"{path} was written with seed {state['seed']}, not {self.seed}; give another trainer.out")
        model.model.load_state_dict(state["model"])
        if optimizer is not None:
            optimizer.load_state_dict(state["optimizer"])
            if metrics.exists():
                lines = [
                    x
                    for x in metrics.read_text().splitlines()
                    if x.endswith("}") and json.loads(x)["step"] < state["steps"]
                ]
                metrics.write_text("".join(line + "\n" for line in lines))
        return int(state["steps"])

    def _export(self, model: RLModule) -> None:
        if self.is_global_zero:
            model.model.save_pretrained(self.out / "hf")
            model.tokenizer.save_pretrained(self.out / "hf")
            self.logger.finalize("success")
            print(f"model: {self.out / 'hf'}")


@contextmanager
def _signals(trainer: RLTrainer) -> Iterator[None]:
    """SIGTERM and Ctrl-C ask the loop to finish its step and save; a second Ctrl-C stops at once."""

    def ask(number: int, frame: Any) -> None:
        if trainer.stop_asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        trainer.stop_asked = True

    kinds = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(kind, ask) for kind in kinds]
    try:
        yield
    finally:
        for kind, handler in zip(kinds, before, strict=True):
            signal.signal(kind, handler)


def _rates(metrics: dict[str, float]) -> str:
    validated = f"  validation {100 * metrics['validation/accuracy']:.1f} %" if "validation/accuracy" in metrics else ""
    return f"reward {metrics['reward']:.3f}  right {100 * metrics['accuracy']:.1f} %  kl {metrics['kl']:.3f}{validated}"
