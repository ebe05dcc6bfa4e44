"""Which sequences are worked on together: micro-batches, packed rows, chunks."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ppo_dist.data import tables
from ppo_dist.data.batching import count_tokens, cut, pack, pack_rows, shares, units
from ppo_dist.data.chunks import chunks
from ppo_dist.reports import TokenCounts
from ppo_dist.types import Chunk, PackedRow, Prompt, Sampling, TrainSequence

lengths = st.lists(st.integers(0, 60), max_size=40)


@settings(max_examples=60, deadline=None)
@given(lengths, st.integers(1, 5), st.integers(1, 80))
def test_cut(lengths: list[int], ranks: int, budget: int) -> None:
    by_rank = cut(lengths, ranks, budget)
    flat = [i for share in by_rank for members in share for i in members]
    assert sorted(flat) == list(range(len(lengths)))
    assert len(by_rank) == ranks
    assert len({len(share) for share in by_rank}) == 1  # as collectives demand
    assert len(by_rank[0]) >= 1
    for share in by_rank:
        for members in share:
            assert sum(lengths[i] for i in members) <= budget or len(members) == 1


def test_cut_by_hand() -> None:
    assert cut([5, 5, 3, 2], ranks=1, budget=8) == [[[0, 2], [1, 3]]]
    assert cut([5, 5, 3, 2], ranks=2, budget=8) == [[[0, 2]], [[1, 3]]]
    # heaviest with lightest, so that both ranks have 10
    assert cut([8, 6, 4, 2], ranks=2, budget=8) == [[[0], [3]], [[1], [2]]]
    assert cut([], ranks=3, budget=4) == [[[]], [[]], [[]]]


def test_cut_evens_out_the_ranks() -> None:
    rng = random.Random(0)
    sizes = [rng.randint(5, 40) for _ in range(60)]
    loads = [sum(sizes[i] for m in share for i in m) for share in cut(sizes, 4, 100)]
    assert max(loads) - min(loads) <= 40  # no more than one unit apart


def tokens(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def test_units_keep_a_prompts_responses_together_within_the_budget() -> None:
    rows = [
        (tokens(5, 6, 7, 1), 2),
        (tokens(9, 1), 1),
        (tokens(5, 6, 8, 9, 1), 2),
        (tokens(5, 6, 1), 2),
        (tokens(5, 6, 7, 8), 3),  # another prompt, although the tokens begin alike
    ]
    assert units(rows, budget=100) == ([[0, 2, 3], [1], [4]], [8, 2, 4])
    assert units(rows, budget=7) == ([[0, 2], [1], [3], [4]], [7, 2, 3, 4])
    assert units(rows, budget=1) == ([[0], [1], [2], [3], [4]], [4, 2, 5, 3, 4])


row = st.tuples(st.integers(0, 3), st.integers(1, 6))


@settings(max_examples=50, deadline=None)
@given(st.lists(row, max_size=25), st.integers(1, 3), st.integers(1, 30))
def test_shares_cover_every_row_once(
    shapes: list[tuple[int, int]], ranks: int, budget: int
) -> None:
    rows = [(tokens(*[p] * (p + 1), *[9] * r), p + 1) for p, r in shapes]
    by_rank = shares(rows, ranks, budget)
    assert sorted(i for share in by_rank for m in share for i in m) == list(range(len(rows)))
    for members in (m for share in by_rank for m in share if len(m) > 1):
        packed = pack_rows([rows[i] for i in members], end=True)
        assert len(packed.tokens_S) <= budget


def sequence(prompt: list[int], response: list[int], scale: float = 1.0) -> TrainSequence:
    count = len(response)

    def numbers(start: float) -> np.ndarray:
        return (start + scale * np.arange(count)).astype(np.float32)

    return TrainSequence(
        uid="v/0:0#0",
        origin="verifiable",
        source="exact",
        tokens_T=tokens(*prompt, *response),
        prompt_tokens=len(prompt),
        policy_weight_R=np.ones(count, np.float32),
        value_weight_R=numbers(0.5),
        ce_weight_R=np.zeros(count, np.float32),
        advantages_R=numbers(10),
        returns_R=numbers(20),
        reference_R=np.zeros(count, np.float32),
        logprobs_R=numbers(-30),
        values_R=numbers(40),
    )


PAIR = [(tokens(5, 6, 7, 1), 2), (tokens(5, 6, 8, 9, 1), 2)]


def test_the_packed_row_of_the_docstring() -> None:
    packed = pack_rows(PAIR, end=False)
    assert packed.tokens_S.tolist() == [5, 6, 7, 8, 9]
    assert packed.positions_S.tolist() == [0, 1, 2, 2, 3]
    assert packed.slots_N.tolist() == [0, 1, 3, 4, 0, 1, 2, 0]
    assert packed.home_S.tolist() == [4, 5, 6, 2, 3]
    assert packed.shapes == ((2, 4, 4),)
    assert packed.states_K.tolist() == [1, 2, 1, 3, 4]
    assert packed.targets_K.tolist() == [7, 1, 8, 9, 1]


def test_the_packed_row_with_the_state_after_the_end() -> None:
    packed = pack_rows(PAIR, end=True)
    assert packed.tokens_S.tolist() == [5, 6, 7, 1, 8, 9, 1]
    assert packed.positions_S.tolist() == [0, 1, 2, 3, 2, 3, 4]
    assert packed.slots_N.tolist() == [0, 1, 4, 5, 6, 0, 1, 2, 3, 0]
    assert packed.home_S.tolist() == [5, 6, 7, 8, 2, 3, 4]
    assert packed.shapes == ((2, 5, 5),)
    assert packed.states_K.tolist() == [1, 2, 3, 1, 4, 5, 6]
    assert packed.targets_K.tolist() == [7, 1, 0, 8, 9, 1, 0]


def seen_by(packed: PackedRow) -> list[np.ndarray]:
    """The row indices that each token of the row sees in attention, itself last."""
    found = []
    begin = 0
    for rows, keys, queries in packed.shapes:
        for _ in range(rows):
            for last in range(keys - queries, keys):
                found.append(packed.slots_N[begin : begin + last + 1])
            begin += keys
    assert begin == len(packed.slots_N)
    return [found[home] for home in packed.home_S]


span = st.tuples(st.integers(1, 9), st.integers(0, 8)).filter(lambda s: s[1] < s[0])


@settings(deadline=None)
@given(st.lists(span, min_size=1, max_size=9), st.integers(0, 60))
def test_tables_are_the_cheapest(spans: list[tuple[int, int]], each: int) -> None:
    """Of all ways to cut the spans, ordered by their ends, but between those that end alike."""

    def cost(found: list[list[int]]) -> int:
        total = 0
        for members in found:
            keys = max(spans[i][0] for i in members)
            total += len(members) * keys * (keys - min(spans[i][1] for i in members)) + each
        return total

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "TABLE", each)
        least, found = tables.tables(spans)
    order = [i for members in found for i in members]
    assert sorted(order) == list(range(len(spans)))
    ends = [spans[i][0] for i in order]
    assert ends == sorted(ends, reverse=True)
    inner = [i for i in range(1, len(order)) if ends[i] < ends[i - 1]]
    every = [c for n in range(len(order)) for c in itertools.combinations(inner, n)]
    ways = ([order[a:b] for a, b in itertools.pairwise((0, *c, len(order)))] for c in every)
    assert least == cost(found) == min(map(cost, ways))


@pytest.mark.parametrize("each", [0, 16384])
@settings(max_examples=50, deadline=None)
@given(shapes=st.lists(row, min_size=1, max_size=8), end=st.booleans())
def test_a_packed_row_can_be_unpacked(each: int, shapes: list[tuple[int, int]], end: bool) -> None:
    rows = [
        (tokens(*[p] * (p + 1), *range(10 * i, 10 * i + r)), p + 1)
        for i, (p, r) in enumerate(shapes)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tables, "TABLE", each)
        packed = pack_rows(rows, end)
    seen, at = seen_by(packed), 0
    for tokens_T, prompt in rows:
        count = len(tokens_T) - prompt + end
        states = packed.states_K[at : at + count]
        path = seen[states[-1]]
        assert states.tolist() == path[prompt - 1 :].tolist()
        assert packed.tokens_S[path].tolist() == tokens_T[: len(tokens_T) - (not end)].tolist()
        assert packed.positions_S[path].tolist() == list(range(len(path)))
        for i, token in enumerate(path):  # what comes before it, whoever it is shared with
            assert seen[token].tolist() == path[: i + 1].tolist()
        assert packed.targets_K[at : at + count - end].tolist() == tokens_T[prompt:].tolist()
        at += count
    assert at == len(packed.states_K) == len(packed.targets_K)


def test_what_is_shared_asks_once() -> None:
    """A prompt of 300 tokens and 8 responses of 20: a table of the one, and one of the others."""
    rows = [(tokens(*[7] * 300, *[n] * 20), 300) for n in range(8)]
    assert pack_rows(rows, end=True).shapes == ((8, 320, 20), (1, 300, 300))
    # two short ones are one table, for which each asks for all
    assert pack_rows(PAIR, end=True).shapes == ((2, 5, 5),)


def test_pack_joins_the_numbers_in_order() -> None:
    batch = pack([sequence([5, 6], [7, 1]), sequence([5, 6], [8, 9, 1], scale=2.0)])
    assert batch.row.tokens_S.tolist() == [5, 6, 7, 8, 9]
    assert batch.policy_weight_K.tolist() == [1] * 5
    assert batch.value_weight_K.tolist() == [0.5, 1.5, 0.5, 2.5, 4.5]
    assert batch.ce_weight_K.tolist() == [0] * 5
    assert batch.advantages_K.tolist() == [10, 11, 10, 12, 14]
    assert batch.returns_K.tolist() == [20, 21, 20, 22, 24]
    assert batch.logprobs_K.tolist() == [-30, -29, -30, -28, -26]
    assert batch.values_K.tolist() == [40, 41, 40, 42, 44]
    assert batch.values_K.dtype == np.float32


def test_pack_of_nothing_weighs_nothing() -> None:
    batch = pack([])
    assert len(batch.row.tokens_S) == 2  # of one it would be compiled anew
    assert len(batch.row.states_K) == len(batch.row.targets_K) == 1
    for weights in (batch.policy_weight_K, batch.value_weight_K, batch.ce_weight_K):
        assert weights.tolist() == [0.0]


def test_tokens_are_counted_not_weighed() -> None:
    # the value weights of two of three tokens are 0.5 and 2.5; a sum would give 4.5
    sequences = [sequence([5], [7, 8, 1]), sequence([5], [1])]
    assert count_tokens(sequences) == TokenCounts(policy=4, value=4, ce=0)
    sequences[0].value_weight_R[0] = 0
    sequences[0].ce_weight_R[:] = [0.25, 0, -1]
    assert count_tokens(sequences) == TokenCounts(policy=4, value=3, ce=2)
    assert count_tokens([]) == TokenCounts(0, 0, 0)


SAMPLING = Sampling(temperature=1.0, max_new_tokens=4, seed=0, stream="train")


def prompt(uid: str, length: int) -> Prompt:
    return Prompt(uid, "verifiable", uid, np.ones(length, np.int64))


def work(made: list[Chunk]) -> list[list[tuple[str, tuple[int, ...]]]]:
    return [[(r.prompt.uid, r.indices) for r in chunk.requests] for chunk in made]


def test_chunks_by_hand() -> None:
    prompts = [prompt("a", 2), prompt("c", 5), prompt("b", 2)]
    made = chunks(prompts, group_size=2, size=4, step=7, version=3, sampling=SAMPLING)
    assert work(made) == [[("c", (0, 1)), ("a", (0, 1))], [("b", (0, 1))]]
    assert [(c.step, c.index, c.version, c.sampling) for c in made] == [
        (7, 0, 3, SAMPLING),
        (7, 1, 3, SAMPLING),
    ]
    assert chunks([], 2, 4, 7, 3, SAMPLING) == []


def test_a_prompt_that_occurs_twice_gets_further_indices() -> None:
    prompts = [prompt("a", 2), prompt("b", 2), prompt("a", 2)]
    made = chunks(prompts, group_size=2, size=10, step=0, version=0, sampling=SAMPLING)
    assert work(made) == [[("a", (0, 1, 2, 3)), ("b", (0, 1))]]


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (3, [[("a", (0, 1, 2))], [("a", (3, 4))], [("b", (0, 1, 2))], [("b", (3, 4))]]),
        (5, [[("a", (0, 1, 2, 3, 4))], [("b", (0, 1, 2, 3, 4))]]),
        # seven would have room for two more, but a group is not split for that
        (7, [[("a", (0, 1, 2, 3, 4))], [("b", (0, 1, 2, 3, 4))]]),
        (10, [[("a", (0, 1, 2, 3, 4)), ("b", (0, 1, 2, 3, 4))]]),
    ],
)
def test_groups_are_split_only_at_the_size(size: int, expected: list) -> None:
    made = chunks([prompt("b", 1), prompt("a", 1)], 5, size, 0, 0, SAMPLING)
    assert work(made) == expected


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(0, 7), max_size=15),
    st.integers(1, 5),
    st.integers(1, 9),
    st.randoms(use_true_random=False),
)
def test_chunks_do_not_depend_on_the_order(
    uids: list[int], group: int, size: int, rng: random.Random
) -> None:
    prompts = [prompt(f"p{u}", 1 + u % 3) for u in uids]
    made = work(chunks(prompts, group, size, 0, 0, SAMPLING))
    shuffled = rng.sample(prompts, len(prompts))
    assert work(chunks(shuffled, group, size, 0, 0, SAMPLING)) == made
    every = [(uid, i) for chunk in made for uid, indices in chunk for i in indices]
    assert sorted(every) == sorted(
        (f"p{u}", i) for u in set(uids) for i in range(group * uids.count(u))
    )
    assert all(1 <= sum(len(indices) for _, indices in chunk) <= size for chunk in made)


def test_what_prompts_begin_with_is_shared() -> None:
    packed = pack_rows([(tokens(5, 9, 7, 1), 2), (tokens(5, 6, 7, 1), 2)], end=False)
    assert packed.tokens_S.tolist() == [5, 6, 7, 9, 7]
    assert packed.positions_S.tolist() == [0, 1, 2, 1, 2]
    assert packed.slots_N.tolist() == [0, 1, 2, 0, 3, 4]
    assert packed.states_K.tolist() == [3, 4, 1, 2]


def test_responses_are_not_shared() -> None:
    """Equal ones get gradients of their own, and one may begin like another's prompt."""
    packed = pack_rows([(tokens(5, 6, 7, 1), 2), (tokens(5, 6, 7, 1), 2)], end=False)
    assert packed.tokens_S.tolist() == [5, 6, 7, 7]
    packed = pack_rows([(tokens(5, 6, 7, 1), 1), (tokens(5, 6, 7, 1), 3)], end=False)
    assert packed.tokens_S.tolist() == [5, 6, 7, 6, 7]


@settings(max_examples=50, deadline=None)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=5), min_size=1, max_size=8))
def test_every_beginning_is_there_once(prompts: list[list[int]]) -> None:
    packed = pack_rows([(tokens(*p, 9), len(p)) for p in prompts], end=False)
    beginnings = {tuple(p[: n + 1]) for p in prompts for n in range(len(p))}
    assert len(packed.tokens_S) == len(beginnings)
    seen = seen_by(packed)
    for p, last in zip(prompts, packed.states_K, strict=True):
        assert packed.tokens_S[seen[last]].tolist() == p
