"""Rollouts that were asked for before the step that learns from them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ppo_dist.protocols import RolloutPool
from ppo_dist.types import Chunk, Prompt, Rollout


class Ahead:
    """The rollouts of the steps to come, step by step, up to `max_lag` of them beside the current
    one. So generation has that much to do while others learn, and no more.

    The rollouts of step t are written by version max(s, t − max_lag) exactly, s being the first
    step that has any: a run with lag is as reproducible as one without.
    """

    def __init__(self, prompts: Mapping[str, Prompt], max_lag: int) -> None:
        self._prompts, self._max_lag = prompts, max_lag
        self._pool: RolloutPool | None = None
        self._underway: dict[int, int] = {}  # tickets by step
        self._done: dict[int, list[Rollout]] = {}
        self.dropped = 0

    def begin(self, pool: RolloutPool) -> None:
        """From now on asks this pool. What another was asked for and did not deliver is gone."""
        self._pool, self._underway = pool, {}

    def unasked(self, step: int, has_begun: bool) -> range:
        """The steps whose rollouts are to be asked for now, before `step` learns. None ahead of the
        first that has any: a run that begins with labels alone changes fast until then.
        """
        asked = [step - 1, *self._underway, *self._done]
        return range(max(asked) + 1, step + 1 + (self._max_lag if has_begun else 0))

    def ask(self, step: int, chunks: Sequence[Chunk]) -> None:
        """Has the rollouts of a step made."""
        assert self._pool is not None, "begin() comes first"
        self._underway[step] = self._pool.submit(chunks)

    def take(self, step: int, version: int, is_frozen: bool) -> list[Rollout]:
        """Waits for the rollouts of a step that version `version` learns from. Those too old for it
        (asked for under a larger `max_lag`) are dropped, and so are those of unlabelled prompts
        after a freeze; `dropped` tells how many.
        """
        self._wait(step)
        rollouts = self._done.pop(step)
        kept = [
            r
            for r in rollouts
            if version - r.version <= self._max_lag
            and not (is_frozen and r.prompt.origin == "unlabelled")
        ]
        self.dropped = len(rollouts) - len(kept)
        return kept

    def forget(self) -> None:
        """After a roll back: they were written by the policy that is gone."""
        self._done, self._underway = {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Waits for all that was asked for: a resumed run must learn from the same."""
        for step in list(self._underway):
            self._wait(step)
        return {str(step): [_packed(r) for r in rollouts] for step, rollouts in self._done.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from there.

        Raises:
            ValueError: a prompt is no longer in the data.
        """
        self._done = {
            int(step): [self._unpacked(r) for r in rollouts] for step, rollouts in state.items()
        }

    def _wait(self, step: int) -> None:
        ticket = self._underway.pop(step, None)
        if ticket is not None:
            assert self._pool is not None
            self._done[step] = self._pool.collect(ticket)

    def _unpacked(self, fields: Mapping[str, Any]) -> Rollout:
        prompt = self._prompts.get(fields["uid"])
        if prompt is None:
            raise ValueError(f"prompt {fields['uid']} is no longer in the data")
        return Rollout(
            prompt=prompt,
            index=fields["index"],
            tokens_R=np.array(fields["tokens"], np.int64),
            logprobs_R=np.array(fields["logprobs"], np.float32),
            text=fields["text"],
            finish=fields["finish"],
            version=fields["version"],
        )


def _packed(rollout: Rollout) -> dict[str, Any]:
    return {
        "uid": rollout.prompt.uid,
        "index": rollout.index,
        "tokens": rollout.tokens_R.tolist(),
        "logprobs": rollout.logprobs_R.tolist(),
        "text": rollout.text,
        "finish": rollout.finish,
        "version": rollout.version,
    }
