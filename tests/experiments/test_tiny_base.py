"""The recipe of the base models trains, saves what loads, and what it measures is what the world's checker says."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rftt_lightning.policy.hf import HFBackend

FOLDER = Path(__file__).parents[2] / "experiments" / "tiny-base"


def script(name: str):
    spec = importlib.util.spec_from_file_location(f"tiny_base_{name}", FOLDER / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


train, measure = script("train"), script("measure")


@pytest.mark.parametrize("world", list(train.RECIPES))
def test_every_document_is_made_of_known_words_and_loss_is_on_the_assistant(world):
    recipe = train.RECIPES[world]._replace(source=measure.SOURCES[world]("train", count=200))
    words = " ".join([*train.PROMPTS.values(), recipe.words]).split()
    tokenizer = train.build_tokenizer(words, recipe.numbers)
    stream = train.chats(recipe, seed=3)
    for chat, _ in zip(stream, range(200), strict=False):
        ids, labels = train.encode(tokenizer, chat)
        assert tokenizer.unk_token_id not in ids
        turns = [message._asdict() for message in chat]
        assert ids == list(tokenizer.apply_chat_template(turns, return_dict=False))
        answers = [i for m in chat if m.role == "assistant" for i in tokenizer(m.content)["input_ids"] + [1]]
        assert [label for label in labels if label != -100] == answers
    ids, labels = next(train.batches(tokenizer, stream, 2560, 0))
    assert ids.shape == labels.shape and ids.numel() <= 2560


@pytest.mark.slow
@pytest.mark.parametrize("world", list(train.RECIPES))
def test_two_steps_train_save_and_can_be_measured(world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train.py", world, "--steps", "2", "--out", str(tmp_path)])
    train.main()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.vocab_size == len(tokenizer)
    source = measure.SOURCES[world]("test", count=8)
    backend = HFBackend(str(tmp_path))
    assert "answers read" in measure.chain_of_thought(source, backend)
    paths = measure.walks(source, backend, temperature=0.7, longest=3)
    assert len(paths) == 8 and all(1 <= len(steps) <= 3 for _, steps in paths)


def test_training_can_start_from_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", lambda *args: None)
    monkeypatch.setattr(sys, "argv", ["train.py", "countdown", "--seed", "1", "--out", str(tmp_path / "first")])
    train.main()
    start = ["--seed", "2", "--start", str(tmp_path / "first"), "--out", str(tmp_path / "second")]
    monkeypatch.setattr(sys, "argv", ["train.py", "countdown", *start])
    train.main()
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("first", "second"))
    assert all(torch.equal(first[name], second[name]) for name in first)
