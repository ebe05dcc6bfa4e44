"""Balanced micro-batches: sequences packed end to end under a token budget, equally many on every
rank.
"""

from __future__ import annotations

import bisect
import heapq
import itertools
from collections.abc import Sequence

import numpy as np

from ppo_dist.data.tables import Span, in_tables
from ppo_dist.reports import TokenCounts
from ppo_dist.types import Floats, Ints, MicroBatch, PackedRow, TrainSequence


def cut(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Indices of units by rank and micro-batch: `cut(...)[rank][micro_batch]`.

    Every rank gets the same number of micro-batches, as collectives demand; some may be empty. None
    holds more than `budget` tokens, unless one unit alone is longer. Loads are evened out: longest
    first, into the emptiest.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    total = sum(lengths)
    at_most = -(-len(lengths) // ranks)
    per_rank = max(1, min(-(-total // (budget * ranks)), at_most))
    while True:
        bins = _emptiest_first(order, lengths, per_rank * ranks)
        if all(len(b) <= 1 or sum(lengths[i] for i in b) <= budget for b in bins):
            break
        per_rank += 1
    bins.sort(key=lambda b: -sum(lengths[i] for i in b))
    by_rank: list[list[list[int]]] = [[] for _ in range(ranks)]
    for position, members in enumerate(bins):
        turn, place = divmod(position, ranks)
        by_rank[place if turn % 2 == 0 else ranks - 1 - place].append(sorted(members))
    return by_rank


def _emptiest_first(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, b) for b in range(count)]
    for i in order:
        load, b = heapq.heappop(heap)
        bins[b].append(i)
        heapq.heappush(heap, (load + lengths[i], b))
    return bins


def units(rows: Sequence[tuple[Ints, int]], budget: int) -> tuple[list[list[int]], list[int]]:
    """(members, lengths): rows with the same prompt together, as far as the budget allows, and
    their packed lengths.

    A row is (tokens_T, prompt length). The prompt of a unit is computed once for all its responses.
    """
    members: list[list[int]] = []
    lengths: list[int] = []
    latest: dict[bytes, int] = {}
    for i, (tokens_T, prompt) in enumerate(rows):
        key = tokens_T[:prompt].tobytes()
        response = len(tokens_T) - prompt
        unit = latest.get(key)
        if unit is None or lengths[unit] + response > budget:
            latest[key] = unit = len(members)
            members.append([])
            lengths.append(prompt)
        members[unit].append(i)
        lengths[unit] += response
    return members, lengths


def shares(
    rows: Sequence[tuple[Ints, int]], ranks: int, budget: int, times: int = 1
) -> list[list[list[int]]]:
    """Indices of rows by rank and micro-batch: `shares(...)[rank][micro_batch]`; see `cut`. With
    `times` micro-batches are larger, but not what stays together in one.
    """
    members, lengths = units(rows, budget)
    return [
        [[i for unit in micro_batch for i in members[unit]] for micro_batch in share]
        for share in cut(lengths, ranks, times * budget)
    ]


def pack(sequences: Sequence[TrainSequence]) -> MicroBatch:
    """One packed row. Without sequences: a target of weight 0 after two tokens, so that a rank with
    nothing takes part too (a row of one token would be compiled anew, see models.compiled).
    """
    if not sequences:
        nothing = np.zeros(1, np.float32)
        return MicroBatch(pack_rows([(np.zeros(3, np.int64), 2)], end=False), *[nothing] * 8)
    return MicroBatch(
        row=pack_rows([(s.tokens_T, s.prompt_tokens) for s in sequences], end=False),
        policy_weight_K=_joined([s.policy_weight_R for s in sequences]),
        value_weight_K=_joined([s.value_weight_R for s in sequences]),
        ce_weight_K=_joined([s.ce_weight_R for s in sequences]),
        advantages_K=_joined([s.advantages_R for s in sequences]),
        returns_K=_joined([s.returns_R for s in sequences]),
        logprobs_K=_joined([s.logprobs_R for s in sequences]),
        reference_K=_joined([s.reference_R for s in sequences]),
        values_K=_joined([s.values_R for s in sequences]),
    )


def pack_rows(rows: Sequence[tuple[Ints, int]], end: bool) -> PackedRow:
    """The packed row of (tokens_T, prompt length) pairs. What prompts have in common at their
    beginning, as a system prompt or worked examples, is there once for all of them.

    With `end` each response has one state more, that after its last token, with a target that means
    nothing.
    """
    tokens: list[Ints] = []
    positions: list[Ints] = []
    paths: list[Ints] = [tokens_T for tokens_T, _ in rows]  # row indices of a sequence's tokens
    order: list[int] = []
    begins: list[int] = []  # where in the row each one's own tokens begin, in that order
    forks: set[int] = set()  # and where those end that others have too
    before = at_before = np.zeros(0, np.int64)
    used = 0
    prompts = [tokens_T[:prompt] for tokens_T, prompt in rows]
    # big-endian bytes sort as the tokens do: so an earlier prompt with most in common comes last
    for b in sorted(range(len(rows)), key=lambda b: prompts[b].astype(">i8").tobytes()):
        common = _common(before, prompts[b])
        own = rows[b][0][common : len(rows[b][0]) - (not end)]
        tokens.append(own)
        positions.append(np.arange(common, common + len(own)))
        paths[b] = np.concatenate([at_before[:common], np.arange(used, used + len(own))])
        order.append(b)
        begins.append(used)
        if common:
            forks.add(int(at_before[common - 1]) + 1)
        before, at_before = prompts[b], paths[b]
        used += len(own)
    positions_S = np.concatenate(positions)

    def spans(bounds: set[int]) -> list[Span]:
        found = []
        for first, after in itertools.pairwise(sorted(bounds)):
            path = paths[order[bisect.bisect_right(begins, first) - 1]]
            found.append(Span(path[: positions_S[after - 1] + 1], int(positions_S[first])))
        return found

    whole = {*begins, used}
    slots_N, home_S, shapes = in_tables([spans(whole), spans(whole | forks)], used)
    targets = [np.append(t[p:], 0) if end else t[p:] for t, p in rows]
    return PackedRow(
        tokens_S=np.concatenate(tokens),
        positions_S=positions_S,
        slots_N=slots_N,
        home_S=home_S,
        shapes=shapes,
        states_K=np.concatenate([at[p - 1 :] for at, (_, p) in zip(paths, rows, strict=True)]),
        targets_K=np.concatenate(targets),
    )


def _common(a: Ints, b: Ints) -> int:
    """How many tokens two prompts have in common at the beginning."""
    least = min(len(a), len(b))
    differ = np.flatnonzero(a[:least] != b[:least])
    return int(differ[0]) if len(differ) else least


def _joined(parts: Sequence[Floats]) -> Floats:
    return np.concatenate(parts).astype(np.float32, copy=False)


def count_tokens(sequences: Sequence[TrainSequence]) -> TokenCounts:
    """Tokens with a non-zero weight, by loss term."""
    return TokenCounts(
        policy=sum(int(np.count_nonzero(s.policy_weight_R)) for s in sequences),
        value=sum(int(np.count_nonzero(s.value_weight_R)) for s in sequences),
        ce=sum(int(np.count_nonzero(s.ce_weight_R)) for s in sequences),
    )
