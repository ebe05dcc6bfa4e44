"""A run's loop on its workers, from data and memory to the last step, and after a roll back on new
workers.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ppo_dist import build
from ppo_dist.config import Config, InputError, Origin, WorkersLost, corrects, uses
from ppo_dist.config.algorithm import Complement
from ppo_dist.config.workers import VllmEngine
from ppo_dist.coordinator.ahead import Ahead
from ppo_dist.coordinator.evaluate import Evaluator
from ppo_dist.coordinator.experience import Experience
from ppo_dist.coordinator.loop import Loop, Memory, Outcome, Parts
from ppo_dist.coordinator.scale import Scale
from ppo_dist.coordinator.state import Checkpoints, RunState, read_state
from ppo_dist.coordinator.stream import Stream
from ppo_dist.coordinator.unlabelled import Probe, Unlabelled
from ppo_dist.data.encode import Encoder
from ppo_dist.protocols import LearnerGroup, Rewards, RolloutPool, Tracker
from ppo_dist.semi.guard import Guard
from ppo_dist.semi.pseudo import PseudoBuffer
from ppo_dist.semi.schedule import Scheduled
from ppo_dist.tracking.local import record_event
from ppo_dist.tracking.metrics import Row
from ppo_dist.types import LabelledExample, Prompt


@dataclass(frozen=True)
class Encoded:
    """The data of a run as tokens.

    `probe` has the prompts, with answers, that stand without them among the unlabelled.

    Example: Encoded(prompts={"verifiable": [Prompt(…)]}, examples=[LabelledExample(…)],
    held_out=[LabelledExample(…)], test=[], probe={}, counts={})
    """

    prompts: dict[Origin, list[Prompt]]
    examples: list[LabelledExample]
    held_out: list[LabelledExample]
    test: list[LabelledExample]
    probe: dict[str, Prompt]
    counts: dict[str, int] = field(default_factory=dict)


def encode(config: Config, rows: build.Rows, model_path: str) -> Encoded:
    """Tokens of all data.

    Raises:
        InputError: nothing is left of a data set, or a prompt is too long where that is an error.
    """
    from transformers import AutoTokenizer

    trust = config.model.trust_remote_code
    try:
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust)
    except Exception as error:  # whatever it is, the user must mend the folder
        reason = " ".join(str(error).split())
        raise InputError(f"{model_path}: its tokenizer cannot be loaded: {reason}") from None
    encoder = Encoder(tokenizer, config.data)
    prompts = {origin: encoder.prompts(group, origin) for origin, group in rows.prompts.items()}
    encoded = Encoded(
        prompts,
        encoder.examples(rows.prompts["labelled"]),
        encoder.examples(rows.held_out),
        encoder.examples(rows.test),
        {p.uid: p for p in encoder.prompts(rows.probe, "labelled")},
        encoder.counts,
    )
    for name, before, after in (
        *((o, rows.prompts[o], prompts[o]) for o in prompts),
        ("held_out", rows.held_out, encoded.held_out),
        ("test", rows.test, encoded.test),
    ):
        if before and not after:
            raise InputError(
                f"data.{name}: no prompt has at most {config.data.max_prompt_tokens} tokens "
                "(data.max_prompt_tokens)"
            )
    _check_lengths(config, encoded, model_path)
    return encoded


def _check_lengths(config: Config, encoded: Encoded, model_path: str) -> None:
    """Raises InputError if a prompt with its response is longer than model or engine allow."""
    from transformers import AutoConfig

    from ppo_dist.models.packing import sliding_window

    trust, new = config.model.trust_remote_code, config.rollout.max_new_tokens
    model = AutoConfig.from_pretrained(model_path, trust_remote_code=trust).get_text_config()
    positions = getattr(model, "max_position_embeddings", None) or math.inf
    engine = config.rollout.engine
    asked = engine.max_model_tokens if isinstance(engine, VllmEngine) else None
    window = sliding_window(model) or math.inf
    context = min((positions, "the model's context"), (window, "its sliding_window"))
    limit, what = min(context, (asked or math.inf, "max_model_tokens"))
    asked_for = [
        p for origin in encoded.prompts if uses(config, origin) for p in encoded.prompts[origin]
    ]
    asked_for += [example.prompt for example in (*encoded.held_out, *encoded.test)]
    for prompt in asked_for:
        if len(prompt.tokens_P) + new > limit:
            raise InputError(
                f"{prompt.uid}: {len(prompt.tokens_P)} tokens and a response of "
                f"rollout.max_new_tokens {new} are more than {what} of {limit}; lower one of them, "
                "or data.max_prompt_tokens"
            )
    for example in (*encoded.examples, *encoded.held_out, *encoded.test):
        if (total := len(example.prompt.tokens_P) + len(example.tokens_R)) > context[0]:
            raise InputError(
                f"{example.prompt.uid}: {total} tokens with its response, more than {context[1]} "
                f"of {context[0]}"
            )


@dataclass(frozen=True)
class Journey:
    """A run's loop on its workers, and after a roll back on new ones."""

    config: Config
    model_path: str
    encoded: Encoded
    memory: Memory
    tracker: Tracker
    lost_at: float | None = None  # when workers of an earlier journey were lost

    def run(
        self, checkpoint: Path | None, state: RunState, interrupted: Callable[[], bool]
    ) -> tuple[Outcome, Loop]:
        """To the last step or a stop, starting with the learners of a checkpoint."""
        pending: Row | None = None
        while True:
            outcome, loop = self._once(checkpoint, state, pending, interrupted)
            if outcome != "roll_back":
                return outcome, loop
            pending = loop.pending
            checkpoint, state = self._back(loop.state)

    def _once(
        self,
        checkpoint: Path | None,
        state: RunState,
        pending: Row | None,
        interrupted: Callable[[], bool],
    ) -> tuple[Outcome, Loop]:
        config, loop = self.config, None
        begins_with = Scale.of(Path(config.run.dir)).at_start(config)
        try:
            with build.workers(begins_with, self.model_path, checkpoint) as workers:
                if self.lost_at is not None and pending is None:
                    seconds = round(time.monotonic() - self.lost_at, 3)
                    self._tell("learners_rebuilt", state.step, seconds=seconds)
                loop = Loop(config, self.memory, self._parts(*workers), state, pending)
                return loop.run(interrupted), loop
        except WorkersLost as error:
            step, reason = (state if loop is None else loop.state).step, str(error)
            detail = str(error.__cause__ or "")
            self._tell("learners_lost", step, reason=reason, detail=detail)
            self.tracker.alert(step, "learners were lost", reason)
            raise

    def _parts(self, learners: LearnerGroup, pool: RolloutPool, reward: Rewards) -> Parts:
        encoded = self.encoded
        evaluators = [
            Evaluator(self.config, name, examples, pool, reward, learners) if examples else None
            for name, examples in (("held_out", encoded.held_out), ("test", encoded.test))
        ]
        return Parts(pool, learners, reward, self.tracker, *evaluators)

    def _back(self, state: RunState) -> tuple[Path, RunState]:
        """The best evaluation's checkpoint, and the run's state with it: what was learned since is
        forgotten, while time and data go on.

        Raises:
            InputError: it is gone.
        """
        folder = Path(self.config.run.dir)
        checkpoint = Checkpoints(folder, 1).of_best(state)
        then, parts = read_state(checkpoint)
        self.memory.load_state_dict(parts, ["experience", "unlabelled"])
        self.memory.guard.rolled_back(state.step)
        self.memory.ahead.forget()
        self._tell("rolled_back", state.step, to_step=state.best_step)
        return checkpoint, replace(state, reinforced=then.reinforced)

    def _tell(self, event: str, step: int, **details: Any) -> None:
        record_event(Path(self.config.run.dir), event, step=step, **details)


def remembered(config: Config, encoded: Encoded) -> Memory:
    """The coordinator's memory at the beginning of a run."""
    prompts, semi, seed = encoded.prompts, config.semi, config.run.seed
    by_uid = {p.uid: p for group in prompts.values() for p in group}
    probe = Probe(encoded.probe, build.reward_source(config)) if encoded.probe else None
    buffer = PseudoBuffer(semi.pseudo, by_uid, seed) if semi.pseudo is not None else None
    return Memory(
        schedule=Scheduled(config.mix),
        stream=Stream(prompts, encoded.examples, seed),
        ahead=Ahead(by_uid, config.stream.max_lag),
        experience=Experience(
            config.algorithm,
            build.advantage_estimator(config.algorithm.advantage),
            corrects(config),
        ),
        unlabelled=Unlabelled(build.gate(semi.gate), semi.pseudo, buffer, probe),
        guard=Guard(semi.guard, is_complement=isinstance(config.mix.policy_coef, Complement)),
    )
