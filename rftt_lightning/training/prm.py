"""A process reward model of our own: a token classifier that learns Monte-Carlo values from stored trees, so that no external
PRM is needed (arXiv 2312.08935). At the question's end and at every closing token it says how likely the path ends right.

Shape suffixes: B rows, T tokens, N ends whose value is learned.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_calibration_error
from transformers import AutoModelForTokenClassification, PreTrainedModel, PreTrainedTokenizerBase

from rftt_lightning.core.contracts import ProblemSource, Status, UserError
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.core.tree import Tree
from rftt_lightning.policy.prm import Writer, functional_writer, relative
from rftt_lightning.policy.vocab import add_functional_tokens, load
from rftt_lightning.search.store import read_trees
from rftt_lightning.training.data import share_of
from rftt_lightning.training.ranks import gather
from rftt_lightning.training.resume import Order, OrderedData, ResumableModule
from rftt_lightning.training.sft import SCHEDULES, scheduled_adamw

ESTIMATES = ("soft", "hard")
BINS = 10
"""Of the calibration error."""


@dataclass(frozen=True)
class ValuedPath:
    """One path of a tree with what is known of its nodes:
    ``ValuedPath((5, 9, 130, 7, 146), (1, 4), (0.5, 1.0), (True, True), ("next_step",), (1.0,), 1.0)``.

    ``ends`` are the places of the question's last token and of each closing token, ``values`` the Monte-Carlo values there in
    [0, 1], None where a node is not to be learned here, ``new`` is False where an earlier path of the tree has the node. ``tags``
    and the exact checker's scores ``checks`` are the steps'; ``right`` says whether the path itself ended right (1 or 0; None: its
    verdict timed out).
    """

    tokens: tuple[int, ...]
    ends: tuple[int, ...]
    values: tuple[float | None, ...]
    new: tuple[bool, ...]
    tags: tuple[str, ...]
    checks: tuple[float | None, ...]
    right: float | None


@dataclass(frozen=True)
class PRMBatch:
    """``tokens_BT`` ids, padded behind what is learned, where a causal model does not look; ``learned_BT`` bool, True at ends with
    a value to learn, ``values_N`` these values row by row. ``paths`` are the rows, none where another rank counts them."""

    tokens_BT: Tensor
    learned_BT: Tensor
    values_N: Tensor
    paths: tuple[ValuedPath, ...]

    def to(self, device: torch.device | str, **kwargs: Any) -> PRMBatch:
        names = ("tokens_BT", "learned_BT", "values_N")
        return replace(self, **{name: getattr(self, name).to(device, **kwargs) for name in names})


def mc_values(tree: Tree, estimate: str) -> list[float | None]:
    """For each node, the mean outcome (1 right, 0 not) of the rollouts through it (``soft``), or 1 if any of them ended right, else
    0 (``hard``): arXiv 2312.08935, sec. 3.3. None where no rollout has a verdict; those whose verdict timed out do not count."""
    right, count = [0] * len(tree), [0] * len(tree)
    for leaf, score in tree.leaves:
        if score.verdict.status is not Status.TIMED_OUT:
            for node in (0, *tree.path(leaf)):
                right[node] += score.verdict.right
                count[node] += 1
    means = [r / n if n else None for r, n in zip(right, count, strict=True)]
    return means if estimate == "soft" else [None if m is None else float(m > 0) for m in means]


def valued_paths(
    tree: Tree, writer: Writer, estimate: str, min_visits: int, max_length: int, source: ProblemSource | None
) -> Iterator[ValuedPath | None]:
    """The paths of a tree; None for one that cannot be written in ``max_length`` tokens. A node is learned from once, in the
    first path that holds it, if at least ``min_visits`` rollouts passed through it."""
    values = mc_values(tree, estimate)
    seen: set[int] = set()
    for rollout in tree.rollouts():
        written = writer(rollout.problem.question, rollout.steps)
        if written is None or len(written.tokens) > max_length:
            yield None
            continue
        nodes = (0, *rollout.nodes)
        new = tuple(k not in seen for k in nodes)
        seen.update(nodes)
        known = [
            values[k] if fresh and tree.visits[k] >= min_visits else None for k, fresh in zip(nodes, new, strict=True)
        ]
        checks = source.check_steps(rollout.problem, rollout.steps) if source else [None] * len(rollout.steps)
        tags = tuple(step.tag for step in rollout.steps)
        verdict = rollout.score.verdict if rollout.score else None
        right = float(verdict.right) if verdict and verdict.status is not Status.TIMED_OUT else None
        yield ValuedPath(written.tokens, written.ends, tuple(known), new, tags, tuple(checks), right)


def collate(paths: Sequence[ValuedPath], pad: int) -> PRMBatch:
    width = max(len(path.tokens) for path in paths)
    tokens_BT = torch.full((len(paths), width), pad)
    learned_BT = torch.zeros(len(paths), width, dtype=torch.bool)
    values = []
    for b, path in enumerate(paths):
        tokens_BT[b, : len(path.tokens)] = torch.tensor(path.tokens)
        for end, value in zip(path.ends, path.values, strict=True):
            if value is not None:
                learned_BT[b, end] = True
                values.append(value)
    return PRMBatch(tokens_BT, learned_BT, torch.tensor(values), tuple(paths))


class PathBatches(Order[PRMBatch]):
    """Batches of paths of like length, of at most ``batch_tokens`` positions with padding; their order is shuffled anew each epoch,
    or kept. Each of ``world`` ranks gets every ``world``-th, and as many as the others: what does not go round is left out of a
    shuffled epoch; in validation the last round is filled up with batches of no paths."""

    def __init__(
        self, paths: Sequence[ValuedPath], batch_tokens: int, pad: int, seed: int, shuffle: bool, rank: int, world: int
    ) -> None:
        super().__init__(seed, shuffle)
        self.paths, self.batch_tokens, self.pad, self.rank, self.world = paths, batch_tokens, pad, rank, world
        self.groups: list[list[int]] = []
        for i in sorted(range(len(paths)), key=lambda i: len(paths[i].tokens)):
            if not self.groups or (len(self.groups[-1]) + 1) * len(paths[i].tokens) > batch_tokens:
                self.groups.append([])
            self.groups[-1].append(i)

    @cached_property
    def known(self) -> dict[str, Any]:
        said = repr([(path.tokens, path.ends, path.values) for path in self.paths]).encode()
        digest = hashlib.blake2b(said, digest_size=8).hexdigest()
        return {"paths": f"{len(self.paths)} {digest}", "batch_tokens": self.batch_tokens}

    def __len__(self) -> int:
        return max(len(self.groups) // self.world, 1) if self.shuffle else math.ceil(len(self.groups) / self.world)

    def batches(self, epoch: int, first: int) -> Iterator[PRMBatch]:
        order = self.shuffled(epoch, len(self.groups))
        for place in range(self.rank + first * self.world, len(self) * self.world, self.world):
            batch = collate([self.paths[i] for i in self.groups[order[place % len(order)]]], self.pad)
            yield batch if self.shuffle or place < len(order) else replace(batch, paths=())


class ValueDataModule(OrderedData):
    """Paths of stored trees with Monte-Carlo values. A problem is in training or in validation, never in both.

    Args:
        trees: stores written by ``rftt search``.
        source: the trees' domain, if it has an exact step checker to compare with; null: none.
        estimate: of a node's value: ``soft``, the mean outcome of its rollouts, or ``hard``, whether any ended right.
        min_visits: rollouts through a node from which on it is learned. 1 takes all: values of few rollouts are noisy, and the
            model averages over nodes. They are of the policy where trees were grown by ``mode: sample``; a search sends more
            rollouts to what looks better, so that its values are those of its choices.
        batch_tokens: positions in one forward pass of one device.
        max_length: longer paths (question included, in tokens) are dropped, and counted.
        val_fraction: share of problems, chosen by a hash of their ids, that is kept for validation.
        seed: of the order.
    """

    def __init__(
        self,
        trees: list[str],
        source: ProblemSource | None = None,
        estimate: str = "soft",
        min_visits: int = 1,
        batch_tokens: int = 8192,
        max_length: int = 8192,
        val_fraction: float = 0.2,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if estimate not in ESTIMATES:
            raise UserError(f"data.estimate is {estimate!r}; use one of {', '.join(ESTIMATES)}")
        if min(min_visits, batch_tokens, max_length) < 1 or not 0 < val_fraction < 1:
            raise UserError(
                f"data out of range: min_visits {min_visits}, batch_tokens {batch_tokens}, max_length {max_length}, val_fraction "
                f"{val_fraction}; need at least 1, and 0 < val_fraction < 1"
            )
        if not trees:
            raise UserError("data.trees is empty; give stores written by `rftt search`")
        self.trees, self.source, self.estimate, self.min_visits = trees, source, estimate, min_visits
        self.batch_tokens, self.max_length, self.val_fraction, self.seed = batch_tokens, max_length, val_fraction, seed
        self.paths: dict[str, list[ValuedPath]] = {}

    def _read(self) -> None:
        """The trees' paths, once the module has its tokenizer."""
        if self.paths:
            return
        module = self.trainer.lightning_module
        writer = functional_writer(module.tokenizer, module.table)
        found: dict[str, list[ValuedPath]] = {"train": [], "validation": []}
        problems: dict[str, set[str]] = {"train": set(), "validation": set()}
        dropped = 0
        limit = min(self.max_length, getattr(module.model.config, "max_position_embeddings", self.max_length))
        for folder in self.trees:
            for tree in read_trees(folder):
                part = "validation" if share_of(tree.problem.id) < self.val_fraction else "train"
                problems[part].add(tree.problem.id)
                for path in valued_paths(tree, writer, self.estimate, self.min_visits, limit, self.source):
                    dropped += path is None
                    if path is not None:
                        found[part].append(path)
        for part, paths in found.items():
            ends = sum(v is not None for path in paths for v in path.values)
            rank_zero_info(f"{part}: {len(problems[part])} problems, {len(paths)} paths, {ends} values")
            if not ends:
                raise UserError(
                    f"{', '.join(self.trees)}: no value for {part} of {len(problems[part])} problems ({dropped} paths "
                    "dropped); give more trees, a lower data.min_visits or another data.val_fraction"
                )
        rank_zero_info(f"{dropped} paths dropped: longer than {limit} tokens")
        self.paths = found

    def train_dataloader(self) -> Order[PRMBatch]:
        self._read()
        learned = [path for path in self.paths["train"] if any(v is not None for v in path.values)]
        return self.resumable(self._batches(learned, shuffle=True))

    def val_dataloader(self) -> PathBatches:
        self._read()
        return self._batches(self.paths["validation"], shuffle=False)

    def _batches(self, paths: list[ValuedPath], shuffle: bool) -> PathBatches:
        pad = self.trainer.lightning_module.tokenizer.pad_token_id
        rank, world = self.trainer.global_rank, self.trainer.world_size
        return PathBatches(paths, self.batch_tokens, pad, self.seed, shuffle, rank, world)


class PRMModule(ResumableModule):
    """A step scorer that learns :class:`PRMBatch` es: cross-entropy against the values, at the ends alone.

    Args:
        model: Hugging Face folder, ``pkg:`` path or hub name of a causal LM; its body gets a head of two labels.
        tokens: functional-token table (YAML); None is the paper's. Tokens that the tokenizer lacks are added.
        lr: peak learning rate.
        weight_decay: of AdamW, on matrices only.
        warmup_steps: optimizer steps over which the learning rate grows linearly.
        schedule: constant, linear or cosine after that.
        final_lr: what the schedule ends at, as a share of ``lr``.
        dtype: of the weights.
        seed: of the head's weights.
    """

    def __init__(
        self,
        model: str,
        tokens: str | None = None,
        lr: float = 1e-5,
        weight_decay: float = 0.01,
        warmup_steps: int = 20,
        schedule: str = "linear",
        final_lr: float = 0.0,
        dtype: str = "float32",
        seed: int = 0,
    ) -> None:
        super().__init__()
        if schedule not in SCHEDULES:
            raise UserError(f"model.schedule is {schedule!r}; use one of {', '.join(SCHEDULES)}")
        if not (lr > 0 and weight_decay >= 0 and warmup_steps >= 0 and 0 <= final_lr <= 1):
            raise UserError(
                f"model out of range: lr {lr}, weight_decay {weight_decay}, warmup_steps {warmup_steps}, final_lr {final_lr}; "
                "need lr > 0, weight_decay >= 0, warmup_steps >= 0, 0 <= final_lr <= 1"
            )
        self.save_hyperparameters()
        self.table = TokenTable.from_yaml(resolve(tokens) if tokens else None)
        if self.table.as_text:
            raise UserError(
                f"the tags of {tokens} are text, and a PRM is asked at closing tokens; give a table without text"
            )
        self.model: PreTrainedModel | None = None
        self.tokenizer: PreTrainedTokenizerBase | None = None
        self.held_out: list[Held] = []

    def configure_model(self) -> None:
        if self.model is not None:
            return
        settings = self.hparams
        torch.manual_seed(settings.seed)
        self.model, self.tokenizer = load(
            settings.model,
            settings.dtype,
            auto=AutoModelForTokenClassification,
            num_labels=2,
            id2label={0: "wrong", 1: "right"},
            label2id={"wrong": 0, "right": 1},
        )
        add_functional_tokens(self.model, self.tokenizer, self.table, seed=settings.seed)
        self.model.train()

    # -- loss ------------------------------------------------------------------------------------------------------------

    def logits(self, batch: PRMBatch) -> Tensor:
        """[B, T, 2], in float32."""
        return self.model(input_ids=batch.tokens_BT, attention_mask=None, use_cache=False).logits.float()

    def compute(self, batch: PRMBatch, count: Tensor | float) -> Tensor:
        """Cross-entropy in nats against the values, summed over the ends that are learned, by their ``count``. Pure."""
        logp_N2 = self.logits(batch)[batch.learned_BT].log_softmax(-1)
        return -(batch.values_N * logp_N2[:, 1] + (1 - batch.values_N) * logp_N2[:, 0]).sum() / count

    def training_step(self, batch: PRMBatch, batch_idx: int) -> Tensor:
        """Ranks average their gradients, so each divides by its share of the values of all: every value weighs the same."""
        count = torch.tensor(float(len(batch.values_N)), device=self.device)
        loss = self.compute(batch, self.trainer.strategy.reduce(count, reduce_op="mean"))
        if not torch.isfinite(loss):
            raise FloatingPointError(f"loss is {loss.item()} at step {self.global_step}; lower model.lr")
        self.log("train/loss", loss, prog_bar=True, batch_size=len(batch.values_N))
        return loss

    # -- validation ------------------------------------------------------------------------------------------------------

    def validation_step(self, batch: PRMBatch, batch_idx: int) -> None:
        values_BT = self.logits(batch).softmax(-1)[..., 1].cpu()
        for row, path in zip(values_BT, batch.paths, strict=False):  # of some batches no path counts
            self.held_out.append(Held(path, tuple(row[list(path.ends)].tolist())))

    def on_validation_epoch_end(self) -> None:
        held, self.held_out = [one for part in gather(self.held_out, self.trainer.world_size) for one in part], []
        metrics = measure(held)
        self.log_dict(
            {f"val/{name}": value for name, value in metrics.items()}, sync_dist=True
        )  # they are the same anyway
        if self.trainer.is_global_zero and not self.trainer.sanity_checking:
            self._show(held, metrics)

    def _show(self, held: Sequence[Held], metrics: dict[str, float]) -> None:
        figure = plot_calibration(held, metrics)
        folder = Path(self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / "calibration.png")
        for logger in self.trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_figure("val/calibration", figure, self.global_step)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        return scheduled_adamw(self, (0.9, 0.999))


@dataclass(frozen=True)
class Held:
    """A held-out path and what the model says at its ends: the question's, then each step's."""

    path: ValuedPath
    said: tuple[float, ...]

    def judged(self) -> Iterator[Judged]:
        """The steps that the exact checker judges, but those that an earlier path has."""
        first = True
        columns = zip(
            self.path.new[1:], self.path.tags, self.path.checks, self.said[1:], relative(self.said), strict=True
        )
        for new, tag, check, value, kept in columns:
            if new and check is not None:
                yield Judged(tag, check, value, kept, first)
            first = first and (check is None or check >= 0.5)


class Judged(NamedTuple):
    """A step: its tag, the exact checker's score, the value said after it, what it keeps of the value before it, and whether no
    earlier step of its path is wrong."""

    tag: str
    check: float
    value: float
    kept: float
    first: bool


def measure(held: Sequence[Held]) -> dict[str, float]:
    """Of held-out paths: ``loss`` (nats) and expected calibration error ``ece`` of the said values, at every step of every path
    whose verdict came in time, against how it ended; AUC of that, ``auc_outcome``. Against the exact checker, over the steps that
    it judges, each node once: ``auc_value`` of the value said after the step and ``auc_step`` of what the step keeps of the value
    before it (:func:`relative`), also by tag, and up to the ``first_error`` of a path, where people stop labelling (arXiv
    2305.20050), as a path that went wrong is worth little however right its next step is. A step is right from a score of 0.5
    on; an AUC with one class only is left out."""
    said, ended = _endings(held)
    bounded = said.clamp(1e-6, 1 - 1e-6)
    found = {
        "loss": float(torch.nn.functional.binary_cross_entropy(bounded, ended)),
        "ece": float(binary_calibration_error(said, ended.int(), n_bins=BINS)),
    }
    rows = [row for one in held for row in one.judged()]
    parts = {"": rows, "/first_error": [row for row in rows if row.first]}
    parts |= {f"/{tag}": [row for row in rows if row.tag == tag] for tag in sorted({row.tag for row in rows})}
    columns = {"auc_outcome": (said.tolist(), ended.tolist())}
    for name, part in parts.items():
        labels = [float(row.check >= 0.5) for row in part]
        columns[f"auc_step{name}"] = ([row.kept for row in part], labels)
        columns[f"auc_value{name}"] = ([row.value for row in part], labels)
    for name, (scores, labels) in columns.items():
        if len(set(labels)) == 2:
            found[name] = float(binary_auroc(torch.tensor(scores), torch.tensor(labels).int()))
    return found


def _endings(held: Sequence[Held]) -> tuple[Tensor, Tensor]:
    """The value said after each step, and how its path ended, where that is known."""
    pairs = [(value, one.path.right) for one in held if one.path.right is not None for value in one.said[1:]]
    said, ended = torch.tensor(pairs).view(-1, 2).unbind(1)
    return said, ended


def plot_calibration(held: Sequence[Held], metrics: dict[str, float]) -> Any:
    """Figure: how often paths ended right against the value said at their steps, in ten bins, and how many steps each bin has."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    said, ended = _endings(held)
    places = (said * BINS).long().clamp(max=BINS - 1)
    counts = torch.bincount(places, minlength=BINS)
    sums = [torch.bincount(places, weights=values, minlength=BINS) for values in (said, ended)]
    told, true = (total[counts > 0] / counts[counts > 0] for total in sums)
    figure, (axes, below) = pyplot.subplots(2, 1, figsize=(4, 5), dpi=120, height_ratios=(3, 1), sharex=True)
    axes.plot([0, 1], [0, 1], color="black", ls="--", lw=1)
    axes.plot(told.tolist(), true.tolist(), marker="o")
    shown = ("ece", "auc_outcome", "auc_value")
    axes.set(ylabel="share that ended right", title="  ".join(f"{n} {metrics[n]:.3f}" for n in shown if n in metrics))
    axes.title.set_fontsize(9)
    below.bar([(i + 0.5) / BINS for i in range(BINS)], counts.tolist(), width=0.9 / BINS)
    below.set(xlabel="value said", ylabel="steps", xlim=(0, 1))
    figure.tight_layout()
    pyplot.close(figure)
    return figure
