"""What of a model is trained: all of it, the rows of its functional tokens alone, or LoRA (arXiv 2106.09685) and these rows."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn.modules.dropout import _DropoutNd
from transformers import PreTrainedModel

from rftt_lightning.core.contracts import UserError
from rftt_lightning.policy.vocab import matrices

TRAINABLE = ("all", "functional_rows", "lora")


@dataclass(frozen=True)
class LoRA:
    """Low-rank updates of the linear layers, ``LoRA(rank=16, alpha=32.0)``.

    ``alpha`` / ``rank`` scales them; ``targets`` are names of layers, or "all-linear", which is all but the output embedding.
    There is no dropout: with it the probability ratio would not begin at one.
    """

    rank: int = 16
    alpha: float = 32.0
    targets: str | list[str] = "all-linear"

    def __post_init__(self) -> None:
        if self.rank < 1 or not self.alpha > 0:
            raise UserError(f"model.lora is out of range: {self}; need rank >= 1 and alpha > 0")


def without_dropout(model: torch.nn.Module) -> None:
    """Switch off what the architecture drops at random while it trains, whole layers, too: a policy is the one that was sampled
    from, so its probability ratio begins at one. The configuration is left as it is."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, float) and ("drop" in name or (name == "p" and isinstance(module, _DropoutNd))):
                setattr(module, name, 0.0)


def adapt(model: PreTrainedModel, rows: Sequence[int], trainable: str, lora: LoRA, seed: int = 0) -> Any:
    """Freeze ``model`` but for what is ``trainable``, in place; returns the peft model around it, None for "all".

    ``rows`` of the input and, if untied, of the output embedding are trained as parameters of their own, [len(rows), hidden], so
    that weight decay moves no other row; LoRA does without any (tags that are text have none). What is trained is in float32,
    whatever the model is in; it starts as the model is. Raises :class:`UserError` for an unknown ``trainable``, or if the model has
    no layers of the names in ``lora``.
    """
    if trainable not in TRAINABLE:
        raise UserError(f"model.trainable is {trainable!r}; use {', '.join(TRAINABLE[:-1])} or {TRAINABLE[-1]}")
    if trainable == "all":
        return None
    import peft  # takes seconds

    ends = [model.get_input_embeddings(), model.get_output_embeddings()][
        : len(matrices(model))
    ]  # peft finds what is tied
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        raise UserError("model.trainable: the output embedding has a bias, which peft would leave out; use all")
    names = {module: name for name, module in model.named_modules()}
    layers = [names[module] for module in ends]
    if trainable == "lora":
        config: Any = peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            target_modules=lora.targets,
            trainable_token_indices={name: list(rows) for name in layers} if rows else None,
            task_type="CAUSAL_LM",
        )
    else:
        config = peft.TrainableTokensConfig(token_indices=list(rows), target_modules=layers, task_type="CAUSAL_LM")
    with torch.random.fork_rng(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*tie_word_embeddings")  # the rows of both ends are one parameter
        torch.manual_seed(seed)
        try:
            adapted = peft.get_peft_model(model, config)
        except ValueError as error:
            raise UserError(f"model.lora: {' '.join(str(error).split())[:200]}") from error
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted
