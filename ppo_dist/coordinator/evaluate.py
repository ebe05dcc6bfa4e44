"""How good a policy version is on the held-out labelled set."""

from __future__ import annotations

from collections.abc import Sequence

from ppo_dist.config import Config
from ppo_dist.data.chunks import chunks
from ppo_dist.protocols import RewardSource, RolloutPool
from ppo_dist.tracking.metrics import Row, evaluation_row
from ppo_dist.types import Prompt, Sampling, Scored

# the same random numbers every time: between two evaluations only the policy differs
EVALUATION_STEP = 0


class Evaluator:
    """Greedy and sampled responses to the held-out prompts, and their rewards."""

    def __init__(
        self, config: Config, prompts: Sequence[Prompt], pool: RolloutPool, reward: RewardSource
    ) -> None:
        self._config, self._pool, self._reward = config, pool, reward
        self._prompts = prompts[: config.eval.max_prompts]

    def __call__(self, version: int) -> tuple[Row, list[Scored]]:
        """Metrics, and the scored greedy responses, of a version that the pool has loaded."""
        greedy = self._responses(version, temperature=0.0, count=1, stream="eval-greedy")
        temperature, count = self._config.rollout.temperature, self._config.eval.samples
        sampled = (
            self._responses(version, temperature, count, stream="eval-sampled") if count else []
        )
        return evaluation_row(greedy, sampled), greedy

    def _responses(self, version: int, temperature: float, count: int, stream: str) -> list[Scored]:
        rollout, evaluation = self._config.rollout, self._config.eval
        sampling = Sampling(
            temperature,
            rollout.max_new_tokens,
            self._config.run.seed,
            stream,
            evaluation.top_p,
            evaluation.top_k,
        )
        self._pool.submit(
            chunks(self._prompts, count, rollout.chunk, EVALUATION_STEP, version, sampling)
        )
        rollouts = self._pool.collect()
        return [Scored(r, s) for r, s in zip(rollouts, self._reward.score(rollouts), strict=True)]
