"""The radix tree of prefixes against a plain dictionary of all prefixes."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rftt_lightning.policy.prefix import PrefixCache

SLOT = 2 * 3 * 2 * 4 * 4  # keys and values, layers, heads, width, float32
TOKENS = st.lists(st.integers(0, 2), max_size=12).map(tuple)


def cache(slots: int) -> PrefixCache:
    made = PrefixCache(slots * SLOT)
    made.shape(torch.zeros(3, 1, 2, 5, 4), torch.zeros(3, 1, 2, 5, 4))
    return made


def value(prefix: tuple[int, ...]) -> float:
    """What stands for the keys and values of a prefix's last token: another number for every prefix."""
    return float(int("1" + "".join(map(str, prefix)), 4))


def insert(made: PrefixCache, tokens: tuple[int, ...], **tags) -> int:
    """Insert, and write what belongs there; returns how many tokens were new."""
    slots = made.insert(tokens, **tags)
    for slot, end in zip(slots, range(len(tokens) - len(slots) + 1, len(tokens) + 1), strict=True):
        made.keys_YHND[:, :, slot] = value(tokens[:end])
        made.values_YHND[:, :, slot] = -value(tokens[:end])
    return len(slots)


def check(made: PrefixCache, tokens: tuple[int, ...]) -> int:
    """What is matched is what was written for exactly this prefix; returns its length."""
    slots = made.match(tokens)
    for slot, end in zip(slots, range(1, len(slots) + 1), strict=True):
        assert (made.keys_YHND[:, :, slot] == value(tokens[:end])).all()
        assert (made.values_YHND[:, :, slot] == -value(tokens[:end])).all()
    return len(slots)


def sound(made: PrefixCache) -> None:
    """Every slot is free or belongs to one edge; parents are younger in use than their children."""
    edges, stack = [], [made.root]
    while stack:
        edges.append(stack.pop())
        stack.extend(edges[-1].children.values())
        for first, child in edges[-1].children.items():
            assert child.parent is edges[-1] and child.tokens[0] == first and len(child.tokens) == len(child.slots)
    used = np.concatenate([edge.slots for edge in edges])
    freed = [slot for slots in made.freed for slot in slots]
    assert sorted([*used, *freed]) == list(range(made.touched))
    assert made.used == len(used) <= made.capacity and made.bytes == len(used) * SLOT <= made.budget
    order = {edge: i for i, edge in enumerate(made.recent)}
    assert set(order) == set(edges[1:])
    assert all(order[edge] < order[edge.parent] for edge in edges[1:] if edge.parent is not made.root)


@given(st.lists(TOKENS, max_size=30), st.lists(TOKENS, min_size=1, max_size=10))
def test_with_room_enough_every_prefix_is_known_once(inserted, asked):
    made, known = cache(1000), {()}
    for tokens in inserted:
        fresh = [tokens[:n] for n in range(len(tokens) + 1) if tokens[:n] not in known]
        assert insert(made, tokens) == len(fresh)
        known.update(fresh)
        sound(made)
    assert made.used == len(known) - 1 and not made.freed
    for tokens in asked:
        longest = max(n for n in range(len(tokens) + 1) if tokens[:n] in known)
        assert check(made, tokens) == longest


@settings(max_examples=200)
@given(st.integers(1, 14), st.lists(TOKENS, max_size=40))
def test_with_little_room_what_is_left_is_right(slots, sequences):
    made = cache(slots)
    for tokens in sequences:
        new = insert(made, tokens)
        sound(made)
        assert check(made, tokens) == len(tokens) if len(tokens) <= slots else not new


def test_what_was_not_used_for_longest_gives_way():
    made = cache(6)
    insert(made, (0, 0, 1))
    insert(made, (0, 0, 2))  # 4 slots
    insert(made, (1, 1))  # 6
    made.match((0, 0, 1))
    insert(made, (2,))
    assert [check(made, t) for t in ((0, 0, 1), (0, 0, 2), (1, 1), (2,))] == [3, 2, 2, 1]
    insert(made, (2, 2, 2))
    assert check(made, (2, 2, 2)) == 3 and check(made, (1, 1)) == 2 and check(made, (0, 0, 1)) < 3


@given(st.lists(st.tuples(TOKENS.filter(len), st.sets(st.integers(0, 12))), max_size=20))
def test_tags_are_kept_where_they_were_seen(sequences):
    made, expected = cache(1000), {}
    for tokens, places in sequences:
        known = check(made, tokens)
        tags = {n: np.array([value(tokens[:n])], np.float32) for n in places if n <= len(tokens)}
        insert(made, tokens, tags=tags, temperature=0.5)
        expected.update({tokens[:n]: row for n, row in tags.items() if n >= known and n})
    for prefix, row in expected.items():
        assert (made.tags(prefix, 0.5) == row).all()
        assert made.tags(prefix, 1.0) is None and made.tags((*prefix, 9), 0.5) is None
    sound(made)


def test_another_version_of_the_policy_knows_nothing_of_the_first():
    made = cache(10)
    made.renew((1, 0))
    insert(made, (0, 1, 2))
    made.renew((1, 0))
    assert check(made, (0, 1, 2)) == 3
    made.renew((2, 0))
    assert check(made, (0, 1, 2)) == 0 and made.used == 0
    sound(made)


def test_what_cannot_fit_costs_nobody_its_place():
    made = cache(4)
    insert(made, (1, 2))
    assert not insert(made, (1, 2, 0, 0, 0)) and not insert(made, (3, 3, 3, 3, 3))
    assert check(made, (1, 2)) == 2


def test_another_dtype_begins_another_pool():
    made = cache(4)
    insert(made, (1, 2))
    keys, values = torch.zeros(3, 1, 2, 5, 4), torch.zeros(3, 1, 2, 5, 4, dtype=torch.bfloat16)
    made.shape(keys, values)  # under autocast
    assert check(made, (1, 2)) == 0 and made.values_YHND.dtype == torch.bfloat16 and made.capacity == 5
    insert(made, (1, 2))
    made.shape(keys, values)
    assert len(made.match((1, 2))) == 2


def test_without_a_budget_or_a_pool_nothing_is_known():
    for made in (PrefixCache(0), PrefixCache(100)):
        assert len(made.insert((1, 2))) == 0 and len(made.match((1, 2))) == 0 and made.bytes == 0
    made = cache(4)
    insert(made, (1, 2))
    made.release()
    assert len(made.match((1, 2))) == 0 and made.bytes == 0 and made.keys_YHND is None
