"""The Fabric loop of RL: roll out -> score -> store -> batch -> learn -> bump the policy version -> log, validate, save."""

from __future__ import annotations

import json
import signal
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from lightning import Fabric
from lightning.fabric.loggers import TensorBoardLogger
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from rftt_lightning.core.contracts import (
    Problem,
    ProblemSource,
    Provenance,
    Reward,
    Rollout,
    Status,
    Unavailable,
    UserError,
)
from rftt_lightning.core.tree import Tree
from rftt_lightning.policy import objectives
from rftt_lightning.policy.hf import HFBackend, fingerprint
from rftt_lightning.policy.rewards import Confidence
from rftt_lightning.policy.vocab import save
from rftt_lightning.search import driver
from rftt_lightning.search.expand import TokenExpander, seed_of
from rftt_lightning.search.store import LOCK, StepStore, describe, differences
from rftt_lightning.training import checkpoints, measures
from rftt_lightning.training.diagnostics import Callback
from rftt_lightning.training.metrics import AnswerAccuracy
from rftt_lightning.training.problems import ProblemDataModule
from rftt_lightning.training.ranks import Ranks
from rftt_lightning.training.rl import MEASURED, RLBatch, RLModule, Work, collate

PRECISIONS = ("32-true", "bf16-mixed")
"""Weights are in float32 in both: in half precision most of RL's small updates would be rounded away."""
STRATEGIES = ("auto", "ddp")
"""With each the weights are whole on each device, as rollouts need them."""
OF_LEARNED = ("reward", "kl", "sampler_gap", "sampler_gap_alarm")
"""Metrics of the rollouts that a step learns from; absent where there are none, for zeros would be taken for measured."""
MANY_TIMED_OUT = 0.05
"""Share of a step's rollouts; if the verdicts of more have timed out, a warning says so."""


class RLTrainer:
    """Trainer of ``rftt rl``: interleaves tree search with REINFORCE++ updates.

    Args:
        expander: how rollouts are made; its sampling temperature must be the model's.
        reward: what they are worth.
        greedy: how validation answers are made; null leaves validation out.
        out: folder of the run: config.yaml, metrics.jsonl (bitwise the same when the run is repeated or resumed on one machine),
            times.jsonl, TensorBoard events, checkpoints/, rollouts/, hf/.
        max_steps: steps; each rolls out one batch of problems and learns from it.
        mini_batches: optimizer updates a step, fewer where a device has fewer rollouts; epochs: passes over the rollouts.
        micro_batch: rollouts that go through the model at once when learning.
        gradient_clip: largest norm of the gradient, above 0.
        gap_alarm: nats, above 0; where the sampler's log-probs differ from the recomputed ones by more than this in the mean over
            sampled tokens (``sampler_gap``), a warning says so and ``sampler_gap_alarm`` is 1.
        drop_timed_out: learn nothing from rollouts whose verdict timed out. Nothing is known of their answers, and the machine's
            load alone can be the cause, so any pay would be noise (OutcomeReward's ``none`` is less than for a wrong answer).
            They are logged as ``dropped``; ``accuracy`` counts them as not right. False learns from what the reward pays: for a
            policy that comes to write what cannot be judged, which dropping does not teach it to leave.
        filter_dead: learn nothing from problems whose rollouts are all right or all not (arXiv 2503.14476, sec. 3.2). Sums are
            then over what is left, and so are the means that they are divided by. ``groups/…`` counts such problems either way.
        refill: with filter_dead, roll out as many further problems as were left out, up to so many times a step.
        save_rollouts: write each step's trees to the store ``out/rollouts``. A run that was killed reads there what the same policy
            grew in a step that it repeats, instead of growing it anew.
        reuse: what it reads: ``steps`` of which all trees were finished, and the run is bitwise the straight one; or finished
            ``trees``, also of a step that was broken off. The others then grow in other company, whose rounding is another: their
            log-probabilities differ in the last digits (on the CPU some 1e-6), and a token may.
        validate_every, checkpoint_every: steps; keep: checkpoints kept, besides the one that validated best, of equals the
            earlier.
        export: whose weights ``hf/`` gets, those of the ``last`` step or of the ``best`` checkpoint.
        accept_changes: go on at a checkpoint with settings that are not those it was written with (a lower model.lr after an
            alarm, say); before the first one the run begins anew. It is then no longer what one config repeats.
        concurrency, parallel, decode_batch: trees that grow together, rollouts under way in one, rows decoded together.
        cache_gb: GiB for the keys and values of prefixes while trees grow; given back before learning.
        seed: of sampling and of the shuffling into mini-batches; the problems' order has data.seed, added rows of the
            vocabulary model.seed. Each is seed_everything where it is null (0 from Python). A step depends on these and on its
            number alone.
        accelerator, devices, num_nodes, strategy: of Fabric. Weights are whole on each device.
        precision: 32-true, or bf16-mixed for weights in float32 and forward passes (rollouts too) in bfloat16.
        callbacks: what is told of each step, see :class:`Callback`.

    Raises :class:`UserError` for values out of range.
    """

    def __init__(
        self,
        expander: TokenExpander,
        reward: Reward,
        greedy: TokenExpander | None = None,
        out: str = "runs/rl",
        max_steps: int = 100,
        mini_batches: int = 1,
        epochs: int = 1,
        micro_batch: int = 64,
        gradient_clip: float = 1.0,
        gap_alarm: float = 0.05,
        drop_timed_out: bool = True,
        filter_dead: bool = False,
        refill: int = 0,
        save_rollouts: bool = True,
        reuse: str = "steps",
        validate_every: int = 10,
        checkpoint_every: int = 10,
        keep: int = 2,
        export: str = "last",
        accept_changes: bool = False,
        concurrency: int = 256,
        parallel: int = 1,
        decode_batch: int = 256,
        cache_gb: float = 4.0,
        seed: int | None = None,
        accelerator: str = "auto",
        devices: int | str = 1,
        num_nodes: int = 1,
        strategy: str = "auto",
        precision: str = "32-true",
        callbacks: list[Callback] | None = None,
    ) -> None:
        for name in (
            "max_steps",
            "mini_batches",
            "epochs",
            "micro_batch",
            "validate_every",
            "checkpoint_every",
            "keep",
            "concurrency",
            "parallel",
            "decode_batch",
            "num_nodes",
        ):
            if locals()[name] < 1:
                raise UserError(f"trainer.{name} is {locals()[name]}; it must be at least 1")
        for name in ("gradient_clip", "gap_alarm"):
            if not locals()[name] > 0:
                raise UserError(f"trainer.{name} is {locals()[name]}; it must be above 0")
        if refill < 0 or (refill and not filter_dead):
            raise UserError(f"trainer.refill is {refill}; it must be 0, or more with trainer.filter_dead true")
        if reuse not in ("steps", "trees"):
            raise UserError(f"trainer.reuse is {reuse}; use steps or trees")
        if export not in ("last", "best") or (export == "best" and greedy is None):
            raise UserError(f"trainer.export is {export}; use last, or best with trainer.greedy, which validates")
        if precision not in PRECISIONS:
            raise UserError(f"trainer.precision is {precision}; use {' or '.join(PRECISIONS)}")
        if strategy not in STRATEGIES:
            raise UserError(
                f"trainer.strategy is {strategy}; use {' or '.join(STRATEGIES)}: each device has the whole weights"
            )
        if not out:
            raise UserError("trainer.out is empty; give a folder")
        self.expander, self.reward, self.greedy, self.out = expander, reward, greedy, Path(out)
        self.max_steps, self.mini_batches, self.epochs, self.micro_batch = max_steps, mini_batches, epochs, micro_batch
        self.gradient_clip, self.drop_timed_out, self.validate_every = gradient_clip, drop_timed_out, validate_every
        self.checkpoint_every, self.folder = checkpoint_every, checkpoints.RunFolder(self.out, keep)
        self.concurrency, self.parallel, self.decode_batch, self.seed = concurrency, parallel, decode_batch, seed or 0
        self.cache_gb, self.gap_alarm = cache_gb, gap_alarm
        self.filter_dead, self.refill, self.exported = filter_dead, refill, export
        self.save_rollouts, self.reuse, self.accept_changes = save_rollouts, reuse, accept_changes
        self.precision, self.callbacks = precision, callbacks or []
        self.fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=strategy,
            precision=precision,  # type: ignore[arg-type]
            callbacks=self.callbacks,
        )
        self.ranks = Ranks(self.fabric)
        self.stop_asked, self.stop_reason = False, ""

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

        A checkpoint goes on only with what its numbers depend on: model, data, expander, reward, seeds and the learning's
        settings. Others may change: those of cost (micro_batch, concurrency, decode_batch, devices), validation, checkpoints,
        callbacks; max_steps only if the learning rate does not fall towards it (model.final_lr 1).

        Args:
            ckpt_path: a checkpoint to begin from; null is the newest one in ``out`` if there is one, "last" insists on it, "none"
                begins anew, without a look at rollouts either. What a run in ``out`` wrote after that point is replaced.
        """
        self._check(model, datamodule)
        self.fabric.launch()
        if datamodule.batch_size < self.fabric.world_size:
            raise UserError(f"data.batch_size is below the {self.fabric.world_size} devices; each needs a problem")
        with self._locked():
            module, optimizer = self.fabric.setup(model, model.configure_optimizers())
            model.reset_reference()  # on the device
            settings = self._settings(model, datamodule)
            self.keep_reference = bool(model.hparams.reference_reset)  # else it is the model that training began with
            first = self._resume(model, optimizer, settings, ckpt_path)
            self.store = self._open_store(settings, first, anew=ckpt_path == "none")
            self.logger = TensorBoardLogger(str(self.out), name="", version="", purge_step=first)
            self.fabric.call("on_train_start", trainer=self, pl_module=model)
            self._loop(first, module, model, optimizer, datamodule, settings)
            self.logger.finalize("success")
            self._export(model, "best" if self.exported == "best" else None)

    def _loop(
        self,
        first: int,
        module: Any,
        model: RLModule,
        optimizer: Any,
        data: ProblemDataModule,
        settings: dict[str, Any],
    ) -> None:
        backend = HFBackend.live(model.model, model.tokenizer, model.table, self.decode_batch, self.cache_gb)
        best = self.folder.best()
        with _signals(self), self._progress() as bar:
            task = bar.add_task("rl", total=self.max_steps, completed=first, rates="")
            for step in range(first, self.max_steps):
                backend.version = step
                try:
                    metrics, times, trees = self._step(step, module, model, optimizer, backend, data)
                except Unavailable:  # nothing of this step is learned yet
                    self._save(step, model, optimizer, settings)
                    raise
                if self.greedy and ((step + 1) % self.validate_every == 0 or step + 1 == self.max_steps):
                    values, answers = self._validate(backend, data)
                    metrics |= values
                    self._show("validation", answers[:4], step)
                self._log(step, metrics, times)
                told = {"step": step, **metrics}
                self.fabric.call("on_step_end", trainer=self, module=model, metrics=told, trees=trees)
                bar.update(task, advance=1, rates=_rates(metrics))
                if (accuracy := metrics.get("validation/accuracy", -1.0)) > best:
                    best = accuracy
                    self._save_best(step + 1, best, model, settings)
                stop = bool(self.ranks.total(self.stop_asked))
                if stop or (step + 1) % self.checkpoint_every == 0 or step + 1 == self.max_steps:
                    self._save(step + 1, model, optimizer, settings)
                if stop and not self.is_global_zero:  # Fabric kills rank zero where another rank ends with a status
                    raise SystemExit
                if stop:
                    raise UserError(self.stop_reason) if self.stop_reason else KeyboardInterrupt

    def stop(self, reason: str) -> None:
        """End the run after this step and its checkpoint, by a :class:`UserError` of this line; asked for on rank zero."""
        self.stop_asked, self.stop_reason = True, reason

    def export(self, model: RLModule, datamodule: ProblemDataModule, ckpt_path: str | None = None) -> None:
        """Write a checkpoint's weights to ``out/hf``, as a run does at its end: of one that was stopped, say.

        Args:
            ckpt_path: a checkpoint, "last" or null for the newest one in ``out``, "best" for that of the best validation.
        """
        self.fabric.launch()
        with self._locked():
            self._export(model, ckpt_path or "last")

    def validate(self, model: RLModule, datamodule: ProblemDataModule, ckpt_path: str | None = None) -> None:
        """Answer the validation problems greedily and print the accuracy; writes nothing.

        Args:
            ckpt_path: a checkpoint whose weights to take, "last" for the newest one in ``out``, "best" for that of the best
                validation; null takes those of model.model.
        """
        if self.greedy is None:
            raise UserError("trainer.greedy is null: say how validation answers are made")
        self.fabric.launch()
        self.fabric.setup(model)
        if ckpt_path and (path := self.folder.choose(ckpt_path)):
            model.load_weights(checkpoints.read(path, "settings", self.fabric.device)["model"])
        backend = HFBackend.live(model.model, model.tokenizer, model.table, self.decode_batch, self.cache_gb)
        metrics, _ = self._validate(backend, datamodule)
        self.fabric.print(json.dumps({name: round(value, 4) for name, value in metrics.items()}))

    def _check(self, model: RLModule, data: ProblemDataModule) -> None:
        """Raises :class:`UserError` where settings of model, data and trainer do not go together."""
        sampling, learned = self.expander.sampling, model.hparams.temperature
        if sampling.temperature != learned:
            raise UserError(
                f"trainer.expander samples at temperature {sampling.temperature}, model.temperature is {learned}; make them the "
                "same"
            )
        if sampling.top_p < 1 and model.hparams.importance == "none":
            warnings.warn(
                f"trainer.expander samples with top_p {sampling.top_p}, but what is learned takes all tokens for possible: "
                "the gradient is biased; use top_p 1, or model.importance",
                stacklevel=2,
            )
        most = data.batch_size * self.expander.rollouts
        if most < self.mini_batches:
            raise UserError(
                f"trainer.mini_batches is {self.mini_batches}, but a step has at most {most} rollouts (data.batch_size times "
                "the expander's rollouts); lower it"
            )

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """``out``, made if need be, for this run alone. Raises :class:`UserError` on all ranks if it cannot be had."""
        lock, trouble = FileLock(self.out / LOCK), ""
        if self.is_global_zero:
            try:
                self.out.mkdir(parents=True, exist_ok=True)
                lock.acquire(blocking=False)
            except Timeout:
                trouble = f"another process is training in {self.out}; wait for it, or give another trainer.out"
            except OSError as error:
                trouble = f"cannot write to {self.out}: {error.strerror}; choose another trainer.out"
        if trouble := self.strategy.broadcast(trouble):
            raise UserError(trouble)
        try:
            yield
        finally:
            lock.release()

    def _step(
        self,
        step: int,
        module: Any,
        model: RLModule,
        optimizer: Any,
        backend: HFBackend,
        data: ProblemDataModule,
    ) -> tuple[dict[str, float], dict[str, float], list[Tree]]:
        """Metrics of a step, its times, and the trees that this rank grew."""
        clock = [time.monotonic()]
        if step and model.hparams.reference_reset and step % model.hparams.reference_reset == 0:
            model.reset_reference()
        progress = driver.Progress()
        trees = self._roll_out(step, model, backend, data, progress)
        self._settle(trees, data.train)
        clock.append(time.monotonic())
        torch.manual_seed(seed_of(self.seed, step, "step"))  # here: the step is the same if its trees were read
        groups = [self._judged(tree) for tree in trees]
        kept = [rollout for group in groups if self._learns_from(group) for rollout in group]
        rollouts = [rollout for tree in trees for rollout in tree.rollouts()]
        # A rank that keeps none must take part in all that the others do, with a row of which nothing is learned.
        batch = collate(kept, model.vocabulary) if kept else collate(rollouts[:1], model.vocabulary).muted()
        batch = batch.to(self.fabric.device)
        with self.fabric.autocast():  # as in the update, or the ratio would not begin at one
            batch = model.prepare(batch, self.micro_batch, self.ranks.sum)
        clock.append(time.monotonic())
        metrics = self._learn(step, module, model, optimizer, batch)
        clock.append(time.monotonic())
        if step % self.validate_every == 0:
            self._text("tree", trees[0].render(), step)
            self._show("tree", trees[0].rollouts()[:3], step)
        metrics |= self._measure(trees, data.train, sum(map(len, groups)), len(kept), batch)
        return metrics, _times(clock, progress), trees

    def _settle(self, trees: Sequence[Tree], source: ProblemSource) -> None:
        """Rewards that hang on what is scored together (a mean that is taken off, say) are those of the whole step on all ranks,
        not of what happened to end at the same time on one of them."""
        mine = [tree.rollout(leaf, score) for tree in trees for leaf, score in tree.leaves]
        gathered = self.ranks.gather(mine)
        begin = sum(map(len, gathered[: self.fabric.global_rank]))
        everyone = [rollout for rollouts in gathered for rollout in rollouts]
        scores = iter(self.ranks.together(lambda: self.reward.score(source, everyone))[begin:])
        for tree in trees:
            tree.leaves = [(leaf, next(scores)) for leaf, _ in tree.leaves]

    def _judged(self, tree: Tree) -> list[Rollout]:
        """The rollouts of a problem, without those whose verdicts timed out if they are dropped."""
        late = Status.TIMED_OUT if self.drop_timed_out else None
        return [rollout for rollout in tree.rollouts() if not rollout.score or rollout.score.verdict.status != late]

    def _learns_from(self, group: Sequence[Rollout]) -> bool:
        return measures.mixed(group) or not self.filter_dead

    def _roll_out(
        self, step: int, model: RLModule, backend: HFBackend, data: ProblemDataModule, progress: driver.Progress
    ) -> list[Tree]:
        """This rank's trees of a step: of the batch's problems, and of further ones where there is nothing to learn from some."""
        rank, ranks = self.fabric.global_rank, self.fabric.world_size
        stored = self._stored(step, model)
        problems, begun, trees = data.batch(step), 0, list[Tree]()
        for turn in range(1 + self.refill):
            mine = problems[rank::ranks]
            fresh = [problem for problem in mine if problem.id not in stored]
            grow = partial(self._grow, mine if fresh and self.reuse == "steps" else fresh, self.expander, self.reward)
            grown = self.ranks.together(
                partial(grow, backend, data.train, seed_of(self.seed, step), progress, self.store)
            )
            found = stored | {tree.problem.id: tree for tree in grown}
            trees += [found[problem.id] for problem in mine]
            live = self.ranks.total(sum(self._learns_from(self._judged(tree)) for tree in trees))
            if turn == self.refill or not (missing := data.batch_size - int(live)):
                break
            problems = data.further(step, begun, missing)
            begun += missing
        if self.store:
            self.store.close_step(trees)
            self.fabric.barrier()
            if self.is_global_zero:
                self.store.tidy_step(ranks)
        return trees

    def _stored(self, step: int, model: RLModule) -> dict[str, Tree]:
        """Trees of this step that a run left which was killed, by problem; from now on the store takes in those that are grown."""
        if not self.store:
            return {}
        policy = model.digest()
        trees = self.store.read_step(step, policy)
        self.fabric.barrier()
        self.store.open_step(step, policy)
        return trees

    def _grow(
        self,
        problems: Sequence[Problem],
        expander: TokenExpander,
        reward: Reward,
        backend: HFBackend,
        source: ProblemSource,
        seed: int,
        progress: driver.Progress,
        store: StepStore | None = None,
    ) -> list[Tree]:
        """A tree for each problem; each goes to the store as soon as it is finished."""
        trees: dict[int, Tree] = {}
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
        with self.fabric.autocast():  # the trees grow here
            for order, tree in grown:
                trees[order] = tree
                if store:
                    store.add(tree)
        backend.release()
        return [trees[order] for order in sorted(trees)]

    def _learn(self, step: int, module: Any, model: RLModule, optimizer: Any, batch: RLBatch) -> dict[str, float]:
        """Shuffled mini-batches, one optimizer update each, accumulated over micro-batches."""
        rate = model.learning_rate(step, self.max_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        sums: Counter[str] = Counter()
        norms, updates = 0.0, 0
        fewest = self.fabric.all_reduce(torch.tensor(len(batch)), reduce_op="min")
        mini_batches = min(self.mini_batches, int(fewest))  # on each rank as many, and none empty
        model.train()
        for _ in range(self.epochs):
            for index in torch.randperm(len(batch)).tensor_split(mini_batches):
                mini = batch.rows(index.to(batch.tokens_BL.device))
                totals = self.ranks.sum(model.totals(mini))
                if totals[1] == 0:  # all ranks dropped all: momentum and weight decay alone are no learning
                    continue
                totals = totals.clamp(min=1.0)
                parts = [part for _, part in mini.split(self.micro_batch)]
                total = torch.zeros(len(MEASURED), device=batch.tokens_BL.device)
                for number, micro in enumerate(parts):
                    with self.fabric.no_backward_sync(module, enabled=number < len(parts) - 1):
                        loss, measured = module(Work(totals, micro))
                        # ranks average their gradients, the totals are global already
                        self.fabric.backward(loss * self.fabric.world_size)
                    total += measured
                sums.update(
                    dict(zip(MEASURED, self.ranks.sum(total).tolist(), strict=True))
                )  # ranks differ in micro-batches
                norm = self.fabric.clip_gradients(
                    module, optimizer, max_norm=self.gradient_clip, error_if_nonfinite=False
                )
                if not torch.isfinite(norm):
                    raise UserError(
                        f"step {step}: the gradient is not finite; go on with a lower model.lr and --trainer.accept_changes true"
                    )
                optimizer.step()
                optimizer.zero_grad()
                norms, updates = norms + float(norm), updates + 1
        means = {name: value / updates for name, value in sums.items()}
        return means | {"grad_norm": norms / max(updates, 1), "lr": rate}

    def _measure(
        self, trees: Sequence[Tree], source: ProblemSource, judged: float, learned: float, batch: RLBatch
    ) -> dict[str, float]:
        """Metrics of a step over all ranks: accuracy and what :mod:`measures` names are those of all rollouts, reward, KL and the
        sampler's gap those of the ``learned`` ones in ``batch`` (:data:`OF_LEARNED`); ``judged`` is how many were not dropped."""
        judged, learned = self.ranks.total(judged), self.ranks.total(learned)
        tokens = self.ranks.sum(batch.mask_BT.sum()).clamp(min=1)
        kl = self.ranks.sum(((batch.old_BT - batch.reference_BT) * batch.mask_BT).sum()) / tokens
        sampled_BT = (batch.provenance_BT == int(Provenance.SAMPLED)) * batch.mask_BT
        gap = float(objectives.sampler_gap(batch.old_BT, batch.behaviour_BT, sampled_BT, self.ranks.sum))
        # Rollouts of one tree share prefixes, so they are not independent: the true interval is wider than this one.
        found = self._verdicts([rollout for tree in trees for rollout in tree.rollouts()])
        sums = measures.count(trees, self.expander.table, source)
        total = self.ranks.sum(torch.tensor(list(sums.values()), dtype=torch.float64)).tolist()
        metrics = {
            "reward": float(self.ranks.sum(batch.rewards_BT.sum()) / max(learned, 1.0)),
            "accuracy": found["accuracy"],
            "accuracy_low": found["low"],
            "accuracy_high": found["high"],
            "problems": self.ranks.total(len(trees)),
            "rollouts": float(found["n"]),
            "dropped": found["n"] - judged,
            "filtered": judged - learned,
            "kl": float(kl),
            "sampler_gap": gap,
            "sampler_gap_alarm": float(gap > self.gap_alarm),
            **measures.rates(dict(zip(sums, total, strict=True))),
            **{f"verdicts/{status}": float(count) for status, count in found["verdicts"].items()},
        }
        return {name: value for name, value in metrics.items() if learned or name not in OF_LEARNED}

    def _verdicts(self, rollouts: Sequence[Rollout]) -> dict[str, Any]:
        """What :class:`AnswerAccuracy` says of the rollouts of all ranks."""
        metric = AnswerAccuracy().to(self.fabric.device)
        metric.update([r.score.verdict for r in rollouts if r.score], [r.problem for r in rollouts if r.score])
        return metric.compute()

    def _validate(self, backend: HFBackend, data: ProblemDataModule) -> tuple[dict[str, float], list[Rollout]]:
        """Metrics of greedy answers to the validation problems, and this rank's answers."""
        problems = data.validation.problems()[self.fabric.global_rank :: self.fabric.world_size]
        progress = driver.Progress()
        trees = self._grow(problems, self.greedy, Confidence(), backend, data.validation, self.seed, progress)  # type: ignore[arg-type]
        answers = [tree.rollouts()[0] for tree in trees]
        found = self._verdicts(answers)
        metrics = {f"validation/{name}": found[name] for name in ("accuracy", "low", "high")}
        return metrics | {"validation/length": self.ranks.total(sum(r.length for r in answers)) / found["n"]}, answers

    # -- logging, saving -------------------------------------------------------------------------------------------------

    def _log(self, step: int, metrics: dict[str, float], times: dict[str, float]) -> None:
        if not self.is_global_zero:
            return
        self.logger.log_metrics(metrics | times, step)
        self.folder.log(step, metrics, times)
        if metrics.get("sampler_gap_alarm"):
            warnings.warn(
                f"step {step}: sampled tokens differ by {metrics['sampler_gap']:.3f} nats between sampler and trainer in the mean "
                f"(trainer.gap_alarm {self.gap_alarm}); does the sampler prune (top_p, min_prior), or has it other weights or "
                "another precision? model.importance corrects for it",
                stacklevel=2,
            )
        late = metrics["verdicts/timed_out"] / metrics["rollouts"]
        if late > MANY_TIMED_OUT:
            fate = "and were dropped" if self.drop_timed_out else "and were learned from as the reward pays them"
            warnings.warn(
                f"step {step}: {100 * late:.0f} % of the verdicts timed out {fate}; is the machine overloaded, or does the policy "
                "write what cannot be judged?",
                stacklevel=2,
            )

    def _show(self, name: str, rollouts: Sequence[Rollout], step: int) -> None:
        """Sample paths with their verdicts in TensorBoard."""
        for i, rollout in enumerate(rollouts):
            path = self.expander.table.render(rollout.steps)
            verdict = rollout.score.verdict.status.value if rollout.score else ""
            self._text(f"{name}/sample_{i}", f"{rollout.problem.question}\n\n{path}\n\n[{verdict}]", step)

    def _text(self, name: str, text: str, step: int) -> None:
        if self.is_global_zero:
            self.logger.experiment.add_text(name, "<pre>" + text.replace("<", "&lt;") + "</pre>", step)

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

    def _settings(self, model: RLModule, data: ProblemDataModule) -> dict[str, Any]:
        """What the numbers of a run depend on, as :meth:`fit` says: a checkpoint keeps it, resuming compares it."""
        names = "seed mini_batches epochs gradient_clip drop_timed_out filter_dead refill parallel precision".split()
        problems = data.train.problems()
        settings = {
            "model": {**model.hparams, "model": f"weights {fingerprint(model.model)}"},
            "data": {
                "train": f"{len(problems)} problems, {seed_of(*problems):x}",
                "batch_size": data.batch_size,
                "seed": data.seed,
            },
            "trainer": {name: getattr(self, name) for name in (*names, "expander", "reward")},
        }
        if model.hparams.final_lr != 1:
            settings["trainer"]["max_steps"] = self.max_steps
        return describe(settings)

    def _save(self, steps: int, model: RLModule, optimizer: Any, settings: dict[str, Any]) -> None:
        """Write a checkpoint; no rank goes on before that. One that ended, as after a stop, would have the others killed."""
        if self.is_global_zero:
            state = {"settings": settings, "model": model.weights_saved(), "optimizer": optimizer.state_dict()}
            if self.keep_reference:
                state["reference"] = model.reference
            self.folder.save(steps, state)
        self.fabric.barrier()

    def _save_best(self, steps: int, accuracy: float, model: RLModule, settings: dict[str, Any]) -> None:
        if self.is_global_zero:
            self.folder.save_best(steps, accuracy, {"settings": settings, "model": model.weights_saved()})

    def _resume(self, model: RLModule, optimizer: Any, settings: dict[str, Any], ckpt_path: str | None) -> int:
        """Go back to a checkpoint; returns the number of steps done. A run that was killed before its first one is begun anew,
        with the trees that it left, and may not have other settings either."""
        path, first = self.folder.choose(ckpt_path), 0
        begun = {} if ckpt_path == "none" else self.folder.begun()
        state = checkpoints.read(path, "settings", self.fabric.device) if path else begun
        if (known := state.get("settings", settings)) != settings and not self.accept_changes:
            raise UserError(
                f"{path or self.out} was written with other settings ({differences(known, settings)}); give another "
                "trainer.out, --ckpt_path none to begin anew, or --trainer.accept_changes true to go on with these"
            )
        if path:
            if "optimizer" not in state:
                raise UserError(f"{path} has weights alone, to validate; training goes on at one of step-*.pt")
            model.load_weights(state["model"])
            asked = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
            optimizer.load_state_dict(state["optimizer"])
            for group, options in zip(optimizer.param_groups, asked, strict=True):
                group.update(options)  # the moments are the checkpoint's, betas and weight decay those of now
            model.reference = state.get("reference", model.reference)
            self.keep_reference |= "reference" in state  # also where it is no more reset
            first = int(state["steps"])
        self.fabric.barrier()  # all have read it
        if self.is_global_zero:
            self.folder.rewind(first)
            self.folder.begin(settings)
        self.fabric.barrier()
        return first

    def _open_store(self, settings: dict[str, Any], first: int, anew: bool) -> StepStore | None:
        if not self.save_rollouts:
            return None
        store = StepStore(self.out / "rollouts", self.fabric.global_rank)
        if self.is_global_zero:
            store.prepare(settings, 0 if anew else self.max_steps, first)
        self.fabric.barrier()
        return store

    def _export(self, model: RLModule, ckpt_path: str | None = None) -> None:
        """Write ``hf/``: the weights of now, or of a checkpoint."""
        if self.is_global_zero:
            if ckpt_path and (path := self.folder.choose(ckpt_path)):
                model.load_weights(checkpoints.read(path, "settings", self.fabric.device)["model"])
            save(model.merged(), model.tokenizer, self.out / "hf")
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
    reward, kl = (f"{name} {metrics[name]:.3f}  " if name in metrics else "" for name in ("reward", "kl"))
    return f"{reward}{kl}right {100 * metrics['accuracy']:.1f} %{validated}"


def _times(clock: Sequence[float], progress: driver.Progress) -> dict[str, float]:
    """Seconds of a step, what they went for, and how fast it generated, on this rank. ``clock`` was read at the step's beginning
    and when it had rolled out, prepared its batch and learned."""
    seconds = clock[-1] - clock[0]
    return {
        "seconds": seconds,
        "tokens_per_second": progress.tokens / max(clock[1] - clock[0], 1e-9),
        "share_rollout": (clock[1] - clock[0] - progress.score_seconds) / seconds,
        "share_score": (clock[2] - clock[1] + progress.score_seconds) / seconds,
        "share_update": (clock[3] - clock[2]) / seconds,
    }
