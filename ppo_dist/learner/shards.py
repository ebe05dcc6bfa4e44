"""Parameters and what the optimizer remembers of them as safetensors, which any number of ranks
write and any other number reads.

A rank writes the pieces that it owns, as they lie in its memory, a file for the weights and for
each kind of state: `weights-0.safetensors`, `exp_avg-0.safetensors`, `step-0.safetensors`. A tensor
in it is called by its parameter and the place where the piece begins in it: `lm.head.weight@4096`.
A rank that reads takes out of all files what its own pieces need, so nothing is ever gathered.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ppo_dist.config import InputError

WEIGHTS = "weights"

# of torch's optimizers: by the tensor that is optimized, its state by kind
State = MutableMapping[torch.Tensor, dict[str, Any]]


@dataclass(frozen=True, eq=False)
class Piece:
    """The elements of a parameter from `start` on, which are `count` elements from `offset` on of
    the tensor that the optimizer sees; the parameter has `whole` elements in all.

    Example: Piece("lm.head.weight", start=4096, count=4096, whole=8192, owner=flat, offset=0)
    """

    name: str
    start: int
    count: int
    whole: int
    owner: torch.Tensor
    offset: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This piece of the owner, or of a tensor shaped like it."""
        return tensor.detach().flatten().narrow(0, self.offset, self.count)


def ranks(folder: Path) -> int:
    """How many ranks wrote into a folder.

    Raises:
        InputError: none did; names what is missing.
    """
    count = len(list(folder.glob(f"{WEIGHTS}-*.safetensors")))
    if count == 0:
        raise InputError(
            f"{folder}: {WEIGHTS}-0.safetensors is missing "
            "(checkpoints of earlier versions, in DeepSpeed's own format, cannot be read)"
        )
    return count


def write(folder: Path, rank: int, pieces: Sequence[Piece], state: State) -> None:
    """Writes a rank's pieces. What lies on a GPU is copied from it kind by kind."""
    tensors: dict[str, dict[str, torch.Tensor]] = {WEIGHTS: {}}
    for piece in pieces:
        key = f"{piece.name}@{piece.start}"
        tensors[WEIGHTS][key] = piece.of(piece.owner)
        for kind, tensor in state.get(piece.owner, {}).items():
            if tensor is not None:  # a number, like that of the steps, stands for all elements
                own = piece.of(tensor) if tensor.dim() else tensor.clone()
                tensors.setdefault(kind, {})[key] = own
    folder.mkdir(parents=True, exist_ok=True)
    for kind, named in tensors.items():
        save_file(named, folder / f"{kind}-{rank}.safetensors")


def read(folder: Path, pieces: Sequence[Piece], state: State | None = None) -> None:
    """Fills a rank's pieces, and the state of its optimizer, which has made no step; without it,
    the weights alone.

    Raises:
        InputError: a file or a parameter is not there, has another size or cannot be read; names
            it.
    """
    ranks(folder)
    with _saved(folder, WEIGHTS) as saved:
        for piece in pieces:
            parts = saved.get(piece.name, [])
            count = sum(_size(part) for _, part in parts)
            if count != piece.whole:
                raise InputError(
                    f"{folder}: of {piece.name} there are {count} elements, not {piece.whole}: "
                    "the checkpoint is of another model"
                )
            _fill(piece, parts, piece.owner, folder)
    if state is not None:
        _read_state(folder, pieces, state)


def _read_state(folder: Path, pieces: Sequence[Piece], state: State) -> None:
    for kind in sorted({path.name.rpartition("-")[0] for path in folder.iterdir()} - {WEIGHTS}):
        with _saved(folder, kind) as saved:
            for piece in pieces:
                if piece.name not in saved:  # it never had a gradient
                    continue
                parts, own = saved[piece.name], state[piece.owner]
                if parts[0][1].get_shape():
                    if kind not in own:
                        own[kind] = torch.zeros_like(piece.owner)
                    _fill(piece, parts, own[kind], folder)
                else:  # parameters that come to share a tensor have the steps of the oldest
                    number = parts[0][1][...].to(piece.owner.device)
                    own[kind] = torch.maximum(number, own.get(kind, number))


@contextlib.contextmanager
def _saved(folder: Path, kind: str) -> Iterator[dict[str, list[tuple[int, Any]]]]:
    """What all ranks wrote of a kind: by parameter, where each piece begins, and the piece, which
    is read when it is sliced.
    """
    found: dict[str, list[tuple[int, Any]]] = {}
    with contextlib.ExitStack() as files:
        for path in sorted(folder.glob(f"{kind}-*.safetensors")):
            try:
                file = files.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: cannot be read: {error}") from None
            for key in file.keys():  # noqa: SIM118  # it is no dict
                name, _, start = key.rpartition("@")
                part = file.get_slice(key)
                if not (start.isascii() and start.isdecimal()) or len(part.get_shape()) > 1:
                    raise InputError(f"{path}: {key!r} is no piece of a parameter")
                found.setdefault(name, []).append((int(start), part))
        yield found


def _size(part: Any) -> int:
    """How many elements a slice has, none if it is a number."""
    return sum(part.get_shape())


def _fill(
    piece: Piece, parts: Sequence[tuple[int, Any]], tensor: torch.Tensor, folder: Path
) -> None:
    """Copies a piece into its place in a tensor, from all that have some of it."""
    into, filled = tensor.detach().view(-1).narrow(0, piece.offset, piece.count), 0
    for start, part in parts:
        first = max(start, piece.start)
        last = min(start + _size(part), piece.start + piece.count)
        if first < last:
            into[first - piece.start : last - piece.start] = part[first - start : last - start]
            filled += last - first
    if filled != piece.count:
        raise InputError(
            f"{folder}: of {piece.name} there are {filled} elements from {piece.start} on, not "
            f"{piece.count}: pieces are missing, or there twice"
        )
