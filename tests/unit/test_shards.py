"""What some ranks wrote of a model and its optimizer, read by others."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path

import pytest
import torch

from ppo_dist.config import InputError
from ppo_dist.learner import shards
from ppo_dist.learner.shards import Piece, State

SIZES = {"a": 7, "b": 1, "c": 12}
VALUES = {name: torch.randn(size) for name, size in SIZES.items()}


def flat(world: int) -> list[tuple[list[Piece], State]]:
    """As ZeRO 1 and 2 cut: all parameters in a row, the row in equal parts, the last one padded.
    The first moment is twice the value, and all made five steps.
    """
    share = -(-sum(SIZES.values()) // world)
    ranks = []
    for rank in range(world):
        owner, begin = torch.full((share,), 9.0), 0
        state: State = defaultdict(dict)
        state[owner] = {"exp_avg": torch.zeros(share), "step": torch.tensor(5.0)}
        pieces = []
        for name, size in SIZES.items():
            first, last = max(begin, rank * share), min(begin + size, (rank + 1) * share)
            if first < last:
                place = slice(first - rank * share, last - rank * share)
                owner[place] = VALUES[name][first - begin : last - begin]
                state[owner]["exp_avg"][place] = 2 * owner[place]
                cut = (first - begin, last - first, size, owner, first - rank * share)
                pieces.append(Piece(name, *cut))
            begin += size
        ranks.append((pieces, state))
    return ranks


def own(world: int) -> list[tuple[list[Piece], State]]:
    """As ZeRO 0 and we do: parameters one by one, each written by one rank. `b` has no gradient."""
    state: State = defaultdict(dict)
    tensors = {name: value.clone() for name, value in VALUES.items()}
    for name in ("a", "c"):
        state[tensors[name]] = {"exp_avg": 2 * tensors[name], "step": torch.tensor(5.0)}
    pieces = [Piece(name, 0, len(t), len(t), t, 0) for name, t in tensors.items()]
    return [(pieces[rank::world], state) for rank in range(world)]


def empty(ranks: list[tuple[list[Piece], State]]) -> list[list[Piece]]:
    for pieces, _ in ranks:
        for piece in pieces:
            piece.owner.fill_(0.0)
    return [pieces for pieces, _ in ranks]


@pytest.mark.parametrize("before", [own, flat])
@pytest.mark.parametrize("after", [own, flat])
@pytest.mark.parametrize(("was", "now"), [(1, 1), (1, 2), (2, 1), (2, 3), (4, 2), (3, 30)])
def test_any_ranks_read_what_any_wrote(
    tmp_path: Path, before: object, after: object, was: int, now: int
) -> None:
    assert callable(before) and callable(after)
    for rank, (pieces, state) in enumerate(before(was)):
        shards.write(tmp_path, rank, pieces, state)
    assert shards.ranks(tmp_path) == was
    for pieces in empty(after(now)):
        state = defaultdict(dict)
        shards.read(tmp_path, pieces, state)
        for piece in pieces:
            cut = slice(piece.start, piece.start + piece.count)
            assert torch.equal(piece.of(piece.owner), VALUES[piece.name][cut])
            if before is own and piece.name == "b":
                assert after is flat or piece.owner not in state
                continue
            assert torch.equal(piece.of(state[piece.owner]["exp_avg"]), 2 * VALUES[piece.name][cut])
            assert float(state[piece.owner]["step"]) == 5


def test_what_is_missing_or_of_another_size_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"weights-0.safetensors is missing"):
        shards.read(tmp_path, [], {})
    pieces, state = own(1)[0]
    shards.write(tmp_path, 0, pieces[:2], state)
    with pytest.raises(InputError, match=r"of c there are 0 elements, not 12"):
        shards.read(tmp_path, pieces, {})
    smaller = Piece("a", 0, 4, 4, torch.zeros(4), 0)
    with pytest.raises(InputError, match=r"of a there are 7 elements, not 4"):
        shards.read(tmp_path, [smaller], {})
