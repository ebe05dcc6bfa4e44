"""Balanced micro-batches: sequences packed end to end under a token budget, equally many on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from ppo_dist.types import Floats, Ints, MicroBatch, TokenCounts, TrainSequence


def cut(lengths: Sequence[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Indices of sequences by rank and micro-batch: `cut(...)[rank][micro_batch]`.

    Every rank gets the same number of micro-batches, as collectives demand; some may be empty. None holds more than
    `budget` tokens, unless one sequence alone is longer. Loads are evened out: longest first, into the emptiest.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    total = sum(lengths)
    per_rank = max(1, -(-total // (budget * ranks)))
    while True:
        bins = _emptiest_first(order, lengths, per_rank * ranks)
        if all(len(b) <= 1 or sum(lengths[i] for i in b) <= budget for b in bins):
            break
        per_rank += 1
    bins.sort(key=lambda b: -sum(lengths[i] for i in b))
    shares: list[list[list[int]]] = [[] for _ in range(ranks)]
    for position, members in enumerate(bins):
        turn, place = divmod(position, ranks)
        shares[place if turn % 2 == 0 else ranks - 1 - place].append(sorted(members))
    return shares


def _emptiest_first(order: Sequence[int], lengths: Sequence[int], count: int) -> list[list[int]]:
    bins: list[list[int]] = [[] for _ in range(count)]
    heap = [(0, b) for b in range(count)]
    for i in order:
        load, b = heapq.heappop(heap)
        bins[b].append(i)
        heapq.heappush(heap, (load + lengths[i], b))
    return bins


def pack(sequences: Sequence[TrainSequence]) -> MicroBatch:
    """One packed row. Without sequences: a single token of weight 0, so that a rank with nothing still takes part."""
    if not sequences:
        zero, nothing = np.zeros(1, np.int64), np.zeros(1, np.float32)
        return MicroBatch(zero, zero, zero, zero, *[nothing] * 7)
    tokens_S, positions_S, states_K = pack_rows(
        [(s.tokens_T, s.prompt_tokens) for s in sequences], end=False
    )
    return MicroBatch(
        tokens_S=tokens_S,
        positions_S=positions_S,
        states_K=states_K,
        targets_K=tokens_S[states_K + 1],
        policy_weight_K=_joined([s.policy_weight_R for s in sequences]),
        value_weight_K=_joined([s.value_weight_R for s in sequences]),
        ce_weight_K=_joined([s.ce_weight_R for s in sequences]),
        advantages_K=_joined([s.advantages_R for s in sequences]),
        returns_K=_joined([s.returns_R for s in sequences]),
        logprobs_K=_joined([s.logprobs_R for s in sequences]),
        values_K=_joined([s.values_R for s in sequences]),
    )


def pack_rows(rows: Sequence[tuple[Ints, int]], end: bool) -> tuple[Ints, Ints, Ints]:
    """(tokens_S, positions_S, states_K) of (tokens_T, prompt length) pairs.

    The states are those that predict the response's tokens; with `end`, also the one after its last token.
    """
    tokens_S = np.concatenate([tokens_T for tokens_T, _ in rows])
    positions_S = np.concatenate([np.arange(len(tokens_T)) for tokens_T, _ in rows])
    starts = np.cumsum([0] + [len(tokens_T) for tokens_T, _ in rows[:-1]])
    last = 0 if end else 1
    states = [
        start + np.arange(prompt - 1, len(tokens_T) - last)
        for start, (tokens_T, prompt) in zip(starts, rows, strict=True)
    ]
    return tokens_S, positions_S, np.concatenate(states)


def _joined(parts: Sequence[Floats]) -> Floats:
    return np.concatenate(parts).astype(np.float32, copy=False)


def count_tokens(sequences: Sequence[TrainSequence]) -> TokenCounts:
    """Tokens with a non-zero weight, by loss term."""
    return TokenCounts(
        policy=sum(int(np.count_nonzero(s.policy_weight_R)) for s in sequences),
        value=sum(int(np.count_nonzero(s.value_weight_R)) for s in sequences),
        ce=sum(int(np.count_nonzero(s.ce_weight_R)) for s in sequences),
    )
