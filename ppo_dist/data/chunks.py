"""Which sequences are generated together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from ppo_dist.types import Chunk, Prompt, Request, Sampling


def chunks(
    prompts: Sequence[Prompt],
    group_size: int,
    size: int,
    step: int,
    version: int,
    sampling: Sampling,
) -> list[Chunk]:
    """Work units of at most `size` sequences, longest prompts first (the uid breaks ties).

    The responses to one prompt stay together as far as `size` allows, so that it is prefilled once;
    a prompt that occurs twice gets twice as many, under further indices. The cut depends on the
    prompts alone, never on how many workers there are: batch composition changes low bits, and in
    bf16 tokens.
    """
    occurrences = Counter(prompt.uid for prompt in prompts)
    distinct = {prompt.uid: prompt for prompt in prompts}.values()
    made: list[list[Request]] = []
    room = 0
    for prompt in sorted(distinct, key=lambda p: (-len(p.tokens_P), p.uid)):
        responses = group_size * occurrences[prompt.uid]
        for begin in range(0, responses, size):
            indices = tuple(range(begin, min(begin + size, responses)))
            if len(indices) > room:
                made.append([])
                room = size
            made[-1].append(Request(prompt, indices))
            room -= len(indices)
    return [Chunk(step, i, version, tuple(requests), sampling) for i, requests in enumerate(made)]
