import gc
import weakref

from rftt_lightning.core.contracts import Message, Request
from rftt_lightning.core.tokens import TokenTable
from rftt_lightning.policy.hf import HFBackend
from rftt_lightning.tiny.model import build_tokenizer
from sft_world import WORDS, build


def test_a_backend_that_is_let_go_is_gone_at_once():
    """And with it what it keeps on a GPU: nothing waits for the garbage collector."""
    tokenizer = build_tokenizer(WORDS)
    backend = HFBackend.live(build(tokenizer), tokenizer, TokenTable.from_yaml(), cache_gb=0.001)
    gc.disable()
    try:
        prompt = backend.chat([Message("user", "one two")])
        (completion,) = backend.generate([Request(prompt, seed=0, max_tokens=3)])
        assert backend.text(prompt) and completion.segments
        gone = weakref.ref(backend)
        del backend
        assert gone() is None
    finally:
        gc.enable()
