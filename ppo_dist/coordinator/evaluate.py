"""How good a policy version is on a set of labelled examples that it never learns from."""

from __future__ import annotations

from collections.abc import Sequence

from ppo_dist.config import Config, remote_rewards
from ppo_dist.coordinator.judge import judged
from ppo_dist.data.chunks import chunks
from ppo_dist.protocols import LearnerGroup, RewardSource, RolloutPool
from ppo_dist.tracking.metrics import Row, evaluation_row
from ppo_dist.types import Dropped, LabelledExample, Sampling, Scored

# the same random numbers every time: between two evaluations only the policy differs
EVALUATION_STEP = 0
# where more of the responses have no reward none counts: best policy, schedules and guard must not
# follow what is left
MAX_DROPPED = 0.1


class Evaluator:
    """Greedy and sampled responses to the examples' prompts and their rewards; the likelihood of
    the labelled responses.
    """

    def __init__(
        self,
        config: Config,
        name: str,
        examples: Sequence[LabelledExample],
        pool: RolloutPool,
        reward: RewardSource,
        learners: LearnerGroup | None,
    ) -> None:
        """Without `learners` there is no likelihood."""
        self._config, self._name = config, name
        self._pool, self._reward, self._learners = pool, reward, learners
        self._examples = examples[: config.eval.max_prompts]

    def __call__(self, version: int) -> tuple[Row, list[Scored], list[Dropped]]:
        """Metrics, the scored greedy responses, and why others have no score, of a version that the
        pool has loaded and that is the learners' own.
        """
        greedy, dropped = self._responses(version, temperature=0.0, count=1, stream="eval-greedy")
        temperature, count = self._config.rollout.temperature, self._config.eval.samples
        sampled: list[Scored] = []
        if count:
            sampled, more = self._responses(version, temperature, count, stream="eval-sampled")
            dropped += more
        lost = float(len(dropped)) if remote_rewards(self._config) else None
        return evaluation_row(self._name, greedy, sampled, self._nll(), lost), greedy, dropped

    def _nll(self) -> float | None:
        """Mean negative log-likelihood of the labelled responses' tokens, in nats."""
        if self._learners is None:
            return None
        annotations = self._learners.annotate(self._examples, imitation=True)
        tokens = sum(len(a.logprobs_R) for a in annotations)
        return -sum(float(a.logprobs_R.sum()) for a in annotations) / tokens

    def _responses(
        self, version: int, temperature: float, count: int, stream: str
    ) -> tuple[list[Scored], list[Dropped]]:
        rollout, evaluation = self._config.rollout, self._config.eval
        sampling = Sampling(
            temperature,
            rollout.max_new_tokens,
            self._config.run.seed,
            stream,
            evaluation.top_p,
            evaluation.top_k,
        )
        prompts = [example.prompt for example in self._examples]
        work = chunks(prompts, count, rollout.chunk, EVALUATION_STEP, version, sampling)
        scored, dropped = judged(self._reward, self._pool.collect(self._pool.submit(work)))
        too_few = len(dropped) > MAX_DROPPED * (len(scored) + len(dropped))
        return [] if too_few else scored, dropped
