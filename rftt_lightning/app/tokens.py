"""``rftt tokens``: the first experiment of a reader of the paper. Are the functional tokens one id each, do their rows differ,
and does the model sample them where they are legal, before and after training?"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rftt_lightning.app.command import make_folder, run_command
from rftt_lightning.core.contracts import QUESTION, Message, UserError
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy import vocab
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.policy.vocab import (
    Vocabulary,
    add_functional_tokens,
    check_round_trip,
    load,
    masked_log_softmax,
    matrices,
)

QUESTIONS = ["What is 7 * 8 - 6?", "3 7 12 target 9", "A train travels 60 km in 45 minutes. How fast is it in km/h?"]


def tokens(
    model: str,
    trained: str | None = None,
    table: str | None = None,
    init: str = "description",
    questions: list[str] = QUESTIONS,
    seed: int = 0,
    save: str | None = None,
) -> None:
    """Show ids, row norms, similarities and sampling probabilities of the functional tokens of a model.

    Args:
        model: Hugging Face folder, `pkg:` path or hub name; functional tokens that it lacks are added.
        trained: the same model after training, to compare with.
        table: functional-token table; null is the paper's.
        init: how added rows start: description, random or mean.
        questions: questions at whose beginnings the probabilities are read.
        seed: of the added rows' noise.
        save: folder to save the model with its functional tokens to.
    """
    if not questions:
        raise UserError("questions is empty; give at least one, at whose beginning the probabilities are read")
    if save is not None:
        make_folder(save, "--save")
    names = TokenTable.from_yaml(resolve(table) if table else None)
    if names.as_text:
        raise UserError(f"the tags of {table} are text: they have no rows to be added or shown")
    console = Console(width=150)
    before, tokenizer = load(model, "float32")
    fresh = add_functional_tokens(before, tokenizer, names, init, seed)
    console.print(f"{model}: {len(fresh)} of {len(names.tags)} functional tags were added")
    models = {"before": (before, tokenizer)}
    if trained:
        models["after"] = load(trained, "float32")
        if _ids(models["after"][1], names) != _ids(tokenizer, names):
            raise UserError(
                f"{trained} has the functional tokens under other ids than {model}; compare a model with itself"
            )
    console.print(_rows(models, names, questions))
    for name, (network, _) in models.items():
        for kind, weight in _weights(network).items():
            console.print(_similarities(weight, _ids(tokenizer, names), names, f"{kind} rows, {name}"))
    if save is not None:
        vocab.save(before, tokenizer, save)
        print(f"model: {save}")


def _ids(tokenizer: PreTrainedTokenizerBase, names: TokenTable) -> list[tuple[int, int]]:
    """Opening and closing id of each functional token."""
    check_round_trip(tokenizer, names)
    known = tokenizer.get_vocab()
    return [(known[token.open], known[token.close]) for token in names.tokens]


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Input rows and, if the head is not tied to them, output rows, both [V, hidden]."""
    return dict(zip(("input", "output"), matrices(model), strict=False))


def _rows(
    models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]], names: TokenTable, questions: list[str]
) -> Table:
    """One line a token: ids, norms of its rows, mean probability over the states in which it is legal."""
    table = Table(
        title="functional tokens, one id each: norms of rows, probability at legal positions (grammar mask, T = 1)"
    )
    for column in ("token", "id", "closing id"):
        table.add_column(column)
    for name, (model, _) in models.items():
        for kind in _weights(model):
            table.add_column(f"{kind} norm {name}", justify="right")
        table.add_column(f"p {name}", justify="right")
    chances = {name: probabilities(*pair, names, questions) for name, pair in models.items()}
    ids = _ids(models["before"][1], names)
    for index, (token, (opening, closing)) in enumerate(zip(names.tokens, ids, strict=True)):
        cells = [token.open, str(opening), str(closing)]
        for name, (model, _) in models.items():
            cells += [f"{weight[opening].float().norm():.3f}" for weight in _weights(model).values()]
            cells.append(f"{chances[name][index]:.4f}")
        table.add_row(*cells)
    return table


@torch.no_grad()
def probabilities(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: TokenTable, questions: list[str]
) -> Tensor:
    """Mean probability [F] of each functional token over all grammar states in which it is legal: after the question, and after
    an empty segment of each token that may precede it."""
    backend = HFBackend.live(model.eval(), tokenizer, names)
    vocabulary = Vocabulary(tokenizer, names, model.get_output_embeddings().weight.shape[0])
    total, count = torch.zeros(len(names.tokens)), torch.zeros(len(names.tokens))
    for question in questions:
        prompt = list(backend.chat([Message("user", question)]))
        for after in (QUESTION, *(name for name in names.names if names.legal(name))):
            i = names.names.index(after) if after != QUESTION else -1
            segment = [vocabulary.opens[i], vocabulary.closes[i]] if i >= 0 else []
            logits = model(input_ids=torch.tensor([prompt + segment])).logits[0, -1]
            state = torch.tensor(vocabulary.boundary(after))
            chance = masked_log_softmax(logits, state, vocabulary.allowed_SV).exp()[vocabulary.opens]
            legal = torch.tensor([name in names.legal(after) for name in names.names])
            total += chance * legal
            count += legal
    return total / count.clamp(min=1)


def _similarities(weight: Tensor, ids: list[tuple[int, int]], names: TokenTable, title: str) -> Table:
    """Cosine similarities of the opening tokens' rows."""
    rows = normalize(weight.detach()[[opening for opening, _ in ids]].float(), dim=1)
    table = Table("", *names.names, title=f"cosine similarity of {title}")
    for name, line in zip(names.names, rows @ rows.T, strict=True):
        table.add_row(name, *(f"{value:.2f}" for value in line.tolist()))
    return table


def main(args: list[str]) -> int | None:
    return run_command(tokens, args, "rftt tokens")
