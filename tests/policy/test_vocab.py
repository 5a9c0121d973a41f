"""Functional tokens become single rows of any vocabulary, which start apart and survive saving."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.functional import normalize
from transformers import AddedToken, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rftt_lightning.core.contracts import QUESTION, UserError
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy import hf
from rftt_lightning.policy.hf import HFBackend, digest
from rftt_lightning.policy.vocab import Vocabulary, _words, add_functional_tokens, check_round_trip, load
from rftt_lightning.tiny.model import build_tokenizer

TABLE = TokenTable.from_yaml()
WORDS = "solve check step combine ok wrong the question answer".split()


def build(tied: bool, spare: int):
    """A random model whose embedding has ``spare`` rows that no token of its tokenizer uses."""
    torch.manual_seed(0)
    tokenizer = build_tokenizer(WORDS, 20)
    size = len(tokenizer) + spare
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=size, tie_word_embeddings=tied, **shape)), tokenizer


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("spare, rows_after", [(0, 16), (5, 16), (16, 16), (40, 40)])
def test_rows_are_added_only_where_spare_ones_do_not_suffice(tied, spare, rows_after):
    model, tokenizer = build(tied, spare)
    known = len(tokenizer)
    backend = tokenizer.backend_tokenizer
    heads = [model.get_input_embeddings(), model.get_output_embeddings()]
    before = [head.weight[:known].clone() for head in heads]
    assert len(add_functional_tokens(model, tokenizer, TABLE)) == 16
    assert tokenizer.backend_tokenizer is backend  # nothing reserved, nothing rebuilt
    after = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
    assert [len(weight) for weight in after] == [
        known + rows_after
    ] * 2 and model.config.vocab_size == known + rows_after
    assert (after[0].data_ptr() == after[1].data_ptr()) == tied
    for old, new in zip(before, after, strict=True):
        assert torch.equal(old, new[:known])
    assert add_functional_tokens(model, tokenizer, TABLE) == [] and len(after[0]) == known + rows_after


@pytest.mark.parametrize("reserved, rows_after", [(20, 0), (16, 0), (6, 10)])
def test_reserved_tokens_are_renamed_before_rows_are_added(reserved, rows_after, tmp_path):
    tokenizer = build_tokenizer(WORDS, 20)
    names = [f"<|reserved_special_token_{i}|>" for i in range(reserved)]
    tokenizer.add_special_tokens({"additional_special_tokens": names})
    tokenizer.add_tokens(["last"])
    size, ids = len(tokenizer), [tokenizer.get_vocab()[name] for name in names]
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=size, **shape))
    given = add_functional_tokens(model, tokenizer, TABLE)
    assert len(model.get_input_embeddings().weight) == size + rows_after
    assert given == [*ids[:16], *range(size, size + rows_after)]
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again = load(str(tmp_path))[1]
    check_round_trip(again, TABLE)
    assert [again.get_vocab()[tag] for tag in TABLE.tags] == given
    assert not set(given) & set(again.all_special_ids)
    assert not set(names[:16]) & set(again.get_vocab()) and set(names[16:]) <= set(again.get_vocab())


@pytest.mark.parametrize("tied", [True, False])
def test_rows_start_apart_unless_asked_otherwise(tied):
    def closest(init: str) -> float:
        model, tokenizer = build(tied, 3)
        ids = add_functional_tokens(model, tokenizer, TABLE, init)
        worst = -1.0
        for head in (model.get_input_embeddings(), model.get_output_embeddings()):
            rows = normalize(head.weight.detach()[ids], dim=1)
            worst = max(worst, float((rows @ rows.T - 2 * torch.eye(len(ids))).max()))
        return worst

    assert closest("mean") > 0.999
    assert closest("description") < 0.97 and closest("random") < 0.97


def test_a_description_is_read_in_the_order_of_its_words():
    """However the interpreter hashes texts: float sums, and so the new rows, hang on the order."""
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(pre_tokenizers.ByteLevel.alphabet())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    texts = [text for word in WORDS for text in (word, " " + word)]
    expected = [i for text in texts for i in fast(text)["input_ids"]]
    assert _words(fast, " ".join(WORDS), len(fast)) == expected


def test_tags_survive_saving_and_the_chat_template(tmp_path):
    model, tokenizer = build(True, 0)
    ids = add_functional_tokens(model, tokenizer, TABLE)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    again, reloaded = load(str(tmp_path), "float32")
    assert torch.equal(again.get_input_embeddings().weight, model.get_input_embeddings().weight)
    text = "".join(TABLE.tags)
    chat = [{"role": "user", "content": text}]
    (start, *inside, _) = reloaded.apply_chat_template(chat, return_dict=False)
    assert reloaded.decode([start]) == "<|user|>" and sorted(inside) == sorted(ids)
    assert "".join(reloaded.convert_ids_to_tokens(inside)) == text


def test_a_tokenizer_without_the_tags_is_refused():
    _, tokenizer = build(True, 0)
    with pytest.raises(UserError, match="no functional token <clarify>"):
        check_round_trip(tokenizer, TABLE)
    with pytest.raises(UserError, match="init is 'zeros'"):
        add_functional_tokens(*build(True, 0), TABLE, "zeros")


@pytest.mark.parametrize("spare", [0, 40])
def test_the_mask_is_the_grammar(spare):
    """At a boundary exactly the opening tags of the legal followers; inside a segment its own closing tag and ordinary
    tokens; special tokens and spare rows never."""
    model, tokenizer = build(True, spare)
    add_functional_tokens(model, tokenizer, TABLE)
    width = len(model.get_input_embeddings().weight)
    vocabulary = Vocabulary(tokenizer, TABLE, width)
    known = tokenizer.get_vocab()
    ordinary = {known[word] for word in WORDS} | {known["\n"]} | {known[str(n)] for n in range(20)}

    def allowed(state: int) -> set[int]:
        return set(vocabulary.allowed_SV[state].nonzero()[:, 0].tolist())

    for after in (QUESTION, *TABLE.names):
        assert allowed(vocabulary.boundary(after)) == {known[f"<{tag}>"] for tag in TABLE.legal(after)}
    for i, name in enumerate(TABLE.names):
        assert allowed(1 + i) == ordinary | {known[f"</{name}>"]}
    assert allowed(0) == ordinary


def test_marks_make_a_token_special_and_no_segment_ends_the_turn():
    """Llama 3 marks tokens special that it lists nowhere; what a generation config names as an end may be marked by nobody."""
    tokenizer = build_tokenizer((*WORDS, "<0x0A>"), 20)
    tokenizer.add_tokens([AddedToken(name, special=True) for name in ("<|eom_id|>", "<|python_tag|>")])
    tokenizer.add_tokens([AddedToken(name, special=False) for name in (*TABLE.tags, "own")])
    known = tokenizer.get_vocab()
    ends = {known["<|end|>"], known["<|eom_id|>"], known["wrong"]}
    allowed_SV = Vocabulary(tokenizer, TABLE, len(tokenizer), sorted(ends)).allowed_SV
    ordinary = {known[word] for word in (*WORDS, "\n", "<0x0A>", "own", *map(str, range(20)))} - ends
    for i, name in enumerate(TABLE.names):
        assert set(allowed_SV[1 + i].nonzero()[:, 0].tolist()) == ordinary | {known[f"</{name}>"]}
    assert set(allowed_SV[0].nonzero()[:, 0].tolist()) == ordinary | ends


def test_two_trainings_in_one_folder_have_two_names(tmp_path):
    model, tokenizer = build(True, 0)
    tokenizer.save_pretrained(tmp_path)
    embeddings, names = model.get_input_embeddings().weight, []
    for shift in (0.0, 0.0, 1e-3):
        with torch.no_grad():
            embeddings[-1, -1] += shift  # no more than the row of a functional token
        model.save_pretrained(tmp_path)
        names.append(HFBackend(str(tmp_path), dtype="float32", device="cpu").name)
    assert names[0] == names[1] != names[2]
    assert HFBackend(str(tmp_path), dtype="float64", device="cpu").name != names[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64, torch.uint8])
def test_a_digest_sees_every_number_and_its_place(dtype, monkeypatch):
    """Whatever the chunks: tensors end within one, at its end, and in words of eight bytes or not."""
    monkeypatch.setattr(hf, "CHUNK", 16)
    tensors = [torch.arange(1, 1 + size).to(dtype) for size in (1, 7, 32)]
    seen = {digest(tensors)}
    for tensor in tensors:
        for i in range(len(tensor)):
            kept = tensor[i].clone()
            tensor[i] += 1
            seen.add(digest(tensors))
            tensor[i] = kept
        seen.add(digest([t.flip(0) if t is tensor else t for t in tensors]))
    assert len(seen) == 1 + 40 + 2  # a single number is its own reverse
    assert digest(tensors) in seen and digest([t.clone() for t in tensors]) == digest(tensors)


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({"dtype": "foo"}, "dtype is 'foo'; use one of auto, bfloat16"),
        ({"dtype": "int8"}, "dtype is 'int8'"),
        ({"device": "tpu"}, "device is 'tpu': .*use auto"),
        ({"device": "cuda:99"}, "device is 'cuda:99': "),
        ({"device": ""}, "device is '': "),
        ({"attention": "foo"}, "foo"),
    ],
)
def test_what_no_machine_or_this_one_has_not_is_refused(wrong, said):
    with pytest.raises(UserError, match=said) as error:
        HFBackend("pkg:tiny/checkpoints/countdown", **wrong)
    assert "\n" not in str(error.value)
