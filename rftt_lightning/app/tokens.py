"""``rftt tokens``: the first experiment of a reader of the paper. Are the functional tokens one id each, do their rows differ,
and does the model sample them where they are legal, before and after training?"""

from __future__ import annotations

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import normalize
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rftt_lightning.app.command import run_command
from rftt_lightning.core.contracts import QUESTION, Message
from rftt_lightning.core.paths import resolve
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.policy.vocab import Vocabulary, add_functional_tokens, load, masked_log_softmax

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
    names = TokenTable.from_yaml(resolve(table) if table else None)
    console = Console(width=150)
    before, tokenizer = load(model, "float32")
    fresh = add_functional_tokens(before, tokenizer, names, init, seed)
    console.print(f"{model}: {len(fresh)} of {len(names.tags)} functional tags were added")
    models = {"before": (before, tokenizer)}
    if trained:
        models["after"] = load(trained, "float32")
    console.print(_rows(models, names, questions))
    for name, (network, _) in models.items():
        console.print(_similarities(network, tokenizer, names, name))
    if save:
        before.save_pretrained(save)
        tokenizer.save_pretrained(save)
        print(f"model: {save}")


def _rows(
    models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]], names: TokenTable, questions: list[str]
) -> Table:
    """One line a token: ids, norms of its rows, mean probability over the states in which it is legal."""
    table = Table(
        title="functional tokens: ids, norms of input rows, probability at legal positions (grammar mask, T = 1)"
    )
    for column in ("token", "id", "closing id", "ids each"):
        table.add_column(column)
    for name in models:
        table.add_column(f"norm {name}", justify="right")
        table.add_column(f"p {name}", justify="right")
    chances = {name: probabilities(*pair, names, questions) for name, pair in models.items()}
    for index, token in enumerate(names.tokens):
        tokenizer = models["before"][1]
        ids = [tokenizer(tag, add_special_tokens=False)["input_ids"] for tag in (token.open, token.close)]
        cells = [token.open, str(ids[0][0]), str(ids[1][0]), f"{len(ids[0])}, {len(ids[1])}"]
        for name, (model, _) in models.items():
            norm = model.get_input_embeddings().weight[ids[0][0]].float().norm()
            cells += [f"{norm:.3f}", f"{chances[name][index]:.4f}"]
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


def _similarities(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, names: TokenTable, title: str) -> Table:
    """Cosine similarities of the opening tokens' input rows."""
    ids = tokenizer.convert_tokens_to_ids([token.open for token in names.tokens])
    rows = normalize(model.get_input_embeddings().weight.detach()[ids].float(), dim=1)
    table = Table("", *names.names, title=f"cosine similarity of input rows, {title}")
    for name, line in zip(names.names, rows @ rows.T, strict=True):
        table.add_row(name, *(f"{value:.2f}" for value in line.tolist()))
    return table


def main(args: list[str]) -> int | None:
    return run_command(tokens, args, "rftt tokens")
