"""A key-value cache of slots: each holds one sequence, of a length of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import Cache

from ppo_dist.types import Ints

FIRST = 32  # columns that a cache begins with


class Slots(Cache):  # type: ignore[misc]
    """Keys and values as one tensor (slots, heads, columns, head dimension) a layer; a sequence
    begins in column 0. A new token is written behind its sequence in place, so a step copies
    nothing; columns double when they do not suffice.
    """

    def __init__(self, slots: int) -> None:
        super().__init__(layers=[])
        self.lengths_B: Ints = np.zeros(slots, np.int64)
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._where: tuple[torch.Tensor, torch.Tensor] | None = None

    def fill(self, slots: Ints, prefilled: Cache, rows: Ints, lengths: Ints) -> None:
        """Puts prefilled sequences into slots: row `rows[i]`, of which the first `lengths[i]`
        columns count, into slot `slots[i]`.
        """
        if not self._keys:
            for layer in prefilled.layers:
                shape = (len(self.lengths_B), layer.keys.shape[1], FIRST, layer.keys.shape[3])
                self._keys.append(layer.keys.new_zeros(shape))
                self._values.append(layer.keys.new_zeros(shape))
        width = int(lengths.max())
        self._make_room(width)
        device = self._keys[0].device
        to, of = torch.from_numpy(slots).to(device), torch.from_numpy(rows).to(device)
        for n, layer in enumerate(prefilled.layers):
            self._keys[n][to, :, :width] = layer.keys[of, :, :width]
            self._values[n][to, :, :width] = layer.values[of, :, :width]
        self.lengths_B[slots] = lengths

    def keep(self, slots: Ints) -> None:
        """Forgets all slots but these, which become 0, 1, 2, …"""
        chosen = torch.from_numpy(slots).to(self._keys[0].device)
        self._keys = [keys[chosen] for keys in self._keys]
        self._values = [values[chosen] for values in self._values]
        self.lengths_B = self.lengths_B[slots]

    def begin(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Before a step in which every slot gets one token: the positions, (slots, 1), and the
        mask, (slots, 1, 1, columns), of that step.
        """
        self._width = int(self.lengths_B.max()) + 1
        self._make_room(self._width)
        device = self._keys[0].device
        at_B = torch.from_numpy(self.lengths_B).to(device)
        self._where = torch.arange(len(at_B), device=device), at_B
        columns = torch.arange(self._width, device=device)
        return at_B[:, None], (columns <= at_B[:, None])[:, None, None]

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *others: Any, **more: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """What the model's attention calls with the new token's keys and values."""
        assert self._where is not None, "begin() comes first"
        rows, columns = self._where
        keys, values = self._keys[layer], self._values[layer]
        keys[rows, :, columns], values[rows, :, columns] = key[:, :, 0], value[:, :, 0]
        return keys[:, :, : self._width], values[:, :, : self._width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """See Cache: of the longest sequence."""
        return int(self.lengths_B.max())

    def _make_room(self, width: int) -> None:
        have = self._keys[0].shape[2]
        if width <= have:
            return
        more = max(width, 2 * have) - have
        pad = (0, 0, 0, more)
        self._keys = [torch.nn.functional.pad(keys, pad) for keys in self._keys]
        self._values = [torch.nn.functional.pad(values, pad) for values in self._values]
