"""Attention's tables: which tokens of a packed row ask together, and what they see."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from ppo_dist.types import Ints, Shapes

TABLE = 128**2
"""What one more table is taken to cost, in pairs of tokens."""


class Span(NamedTuple):
    """Tokens that follow each other both in the packed row and in a sequence: those from `begin`
    on of what `path_T` lists, the row indices of that sequence's tokens up to them.

    Example, the second response in [5, 6, 7, 8, 9], after the prompt [5, 6]:
        Span(path_T=[0, 1, 3, 4], begin=2)
    """

    path_T: Ints
    begin: int


def in_tables(ways: Sequence[Sequence[Span]], tokens: int) -> tuple[Ints, Ints, Shapes]:
    """(slots_N, home_S, shapes) of a PackedRow of that many tokens, by the cheapest of several ways
    to have each in one span.
    """
    made = [tables([(len(span.path_T), span.begin) for span in spans]) for spans in ways]
    best = min(range(len(ways)), key=lambda way: made[way][0])
    spans, (_, grouped) = ways[best], made[best]
    shapes, slots, asked = [], [], 0
    home_S = np.zeros(tokens, np.int64)
    for members in grouped:
        width = len(spans[members[0]].path_T)
        least = min(spans[i].begin for i in members)
        table = np.zeros((len(members), width), np.int64)
        for row, (path_T, begin) in zip(table, (spans[i] for i in members), strict=True):
            row[: len(path_T)] = path_T
            home_S[path_T[begin:]] = asked + np.arange(begin - least, len(path_T) - least)
            asked += width - least
        slots.append(table.ravel())
        shapes.append((len(members), width, width - least))
    return np.concatenate(slots), home_S, tuple(shapes)


def tables(spans: Sequence[tuple[int, int]]) -> tuple[int, list[list[int]]]:
    """Spans, as (end, begin), in tables, the longest first, and what these cost: the sum over them
    of rows × keys × queries, and TABLE each. A table has as many keys as its longest needs, and as
    many queries as the one that begins first. No way costs less that takes them in order of their
    ends, and those that end alike together.
    """
    order = sorted(range(len(spans)), key=lambda i: (-spans[i][0], spans[i][1], i))
    long = [spans[i][0] for i in order]
    cuts = [i for i in range(len(order)) if not i or long[i] < long[i - 1]]
    least, starts = {0: 0}, {}
    for stop, end in enumerate([*cuts[1:], len(order)], 1):
        costs, first = {}, long[0]
        for start in reversed(cuts[:stop]):
            first = min(first, spans[order[start]][1])  # of equal ends the earliest begin is first
            pairs = (end - start) * long[start] * (long[start] - first)
            costs[start] = least[start] + pairs + TABLE
        starts[end] = min(costs, key=costs.__getitem__)
        least[end] = costs[starts[end]]
    found, end = [], len(order)
    while end:
        found.append(order[starts[end] : end])
        end = starts[end]
    return least[len(order)], found[::-1]
