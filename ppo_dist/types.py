"""The records that flow through a run, one way, each made by one stage and never changed.

    Prompt ─▶ Rollout ─▶ Scored ─▶ Annotated ─▶ TrainSequence ─▶ MicroBatch ─▶ StepReport
     data     rollout    rewards    learner      coordinator       data         learner

Names of arrays end in their dimensions:

    P  tokens of a prompt                 S  tokens of a packed row
    R  tokens of a response               K  response positions of a packed row
    T  tokens of a sequence, P + R        B, L  sequences in a padded table, its width
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from ppo_dist.config.base import Origin

Ints = NDArray[np.int64]
Floats = NDArray[np.float32]
Bools = NDArray[np.bool_]
Shapes = tuple[tuple[int, int, int], ...]  # (rows, keys, queries) of each table of a PackedRow
FinishReason = Literal["eos", "length"]


@dataclass(frozen=True, eq=False)
class Checker:
    """What a verifier needs to judge a response to one question.

    Example: Checker(task="spell_backward", options={"max_word_len": 5}, entry={"question": …,
    "answer": "olleh", …})
    """

    task: str
    options: Mapping[str, Any]
    entry: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class Prompt:
    """A question as the model sees it. `answer` and `checker` are None for unlabelled prompts,
    whatever their file says.

    Example: Prompt(uid="verifiable/0:17", origin="verifiable", text="hello>", tokens_P=[8, 5, 12,
    12, 15, 3], answer="olleh")
    """

    uid: str
    origin: Origin
    text: str
    tokens_P: Ints
    answer: str | None = None
    checker: Checker | None = None


@dataclass(frozen=True, eq=False)
class LabelledExample:
    """A prompt and the response to imitate, its end-of-sequence token included.

    Example: LabelledExample(prompt=Prompt(…), response="olleh", tokens_R=[15, 12, 12, 5, 8, 1])
    """

    prompt: Prompt
    response: str
    tokens_R: Ints


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn. Temperature 0 is greedy. `stream` keeps the random numbers of
    training and evaluation apart.

    `top_p` and `top_k` cut the distribution's tail, for evaluation alone.

    Example: Sampling(temperature=1.0, max_new_tokens=8, seed=0, stream="train")
    """

    temperature: float
    max_new_tokens: int
    seed: int
    stream: str
    top_p: float = 1.0
    top_k: int = 0


@dataclass(frozen=True, eq=False)
class Request:
    """One prompt of a chunk and the indices of its responses there; a prompt may continue in the
    next chunk.

    Example: Request(prompt=Prompt(…), indices=(0, 1, 2, 3))
    """

    prompt: Prompt
    indices: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Chunk:
    """Sequences that are generated together. What is in it follows from (step, index) alone, so its
    numbers do too.

    Example: Chunk(step=12, index=3, version=12, requests=(Request(…), …), sampling=Sampling(…))
    """

    step: int
    index: int
    version: int
    requests: tuple[Request, ...]
    sampling: Sampling


@dataclass(frozen=True, eq=False)
class Rollout:
    """A response that the policy of `version` wrote; `logprobs_R` are the behaviour
    log-probabilities of its tokens.

    Example: Rollout(prompt=Prompt(…), index=0, tokens_R=[15, 12, 1], logprobs_R=[-.1, -.7, -.01],
        text="ol", finish="eos", version=12)
    """

    prompt: Prompt
    index: int
    tokens_R: Ints
    logprobs_R: Floats
    text: str
    finish: FinishReason
    version: int


@dataclass(frozen=True)
class Vote:
    """What a group agrees on. `label` is None where nothing wins: a tie, or no answer at all.

    `share` is the winner's part of all responses, `margin` what it is ahead of the next by, and
    `entropy` that of the answers that could be taken out, in nats.

    Example: Vote(label="7", share=0.5, margin=0.25, entropy=0.636)
    """

    label: str | None
    share: float
    margin: float
    entropy: float


@dataclass(frozen=True)
class Ballot:
    """One response's part in a vote: the vote of its whole group, the answer taken out of it, and
    whether it can be judged (with `leave_one_out` the others may have no majority).

    Example: Ballot(vote=Vote("7", 0.5, 0.25, 0.636), answer="7", judged=True)
    """

    vote: Vote
    answer: str | None
    judged: bool


@dataclass(frozen=True)
class Score:
    """A reward and where it came from; `fault` says why a checker failed and the reward is 0.

    Example: Score(value=1.0, source="reasoning_gym")
    """

    value: float
    source: str
    fault: str | None = None
    ballot: Ballot | None = None

    @property
    def is_right(self) -> bool:
        """Whether it is full marks: 1 or more, rounding aside."""
        return self.value >= 1 - 1e-9


@dataclass(frozen=True)
class Dropped:
    """In place of a score: why there is none. The response then counts nowhere.

    Example: Dropped(reason="reward server https://…: no answer within 30 s, asked 4 times")
    """

    reason: str


@dataclass(frozen=True, eq=False)
class Scored:
    """A rollout with its score.

    Example: Scored(rollout=Rollout(…), score=Score(value=1.0, source="exact"))
    """

    rollout: Rollout
    score: Score


@dataclass(frozen=True, eq=False)
class Annotation:
    """What the learner's models say of one sequence: one number per response token, before any
    update of the step.

    `values_R[i]` is the critic's value of the state before token i; `value_end` that of the state
    after the last one.

    Example: Annotation(logprobs_R=[-.1, -.7, -.01], reference_R=[-.1, -.6, -.02], values_R=[.4, .5,
    .9], value_end=.1)
    """

    logprobs_R: Floats
    reference_R: Floats
    values_R: Floats
    value_end: float


@dataclass(frozen=True, eq=False)
class TrainSequence:
    """One sequence and, per response token, the weight of each loss term. Trainer and batcher know
    no other kind.

    A rollout has policy and value weights of 1 and no ce weight; a labelled example the reverse.
    `origin` is its prompt's; `source` is what judged it, or `label`, or `pseudo_label`.

    Example: TrainSequence(uid="labelled/0:3", origin="labelled", source="label", tokens_T=[8, 5, 3,
        5, 8, 1], prompt_tokens=3, policy_weight_R=[0, 0, 0], value_weight_R=[0, 0, 0],
        ce_weight_R=[1, 1, 1], advantages_R=…, returns_R=…, logprobs_R=…, reference_R=…,
        values_R=…)
    """

    uid: str
    origin: Origin
    source: str
    tokens_T: Ints
    prompt_tokens: int
    policy_weight_R: Floats
    value_weight_R: Floats
    ce_weight_R: Floats
    advantages_R: Floats
    returns_R: Floats
    logprobs_R: Floats
    reference_R: Floats
    values_R: Floats


@dataclass(frozen=True, eq=False)
class PackedRow:
    """Sequences in one row without padding; what their prompts have in common at the beginning is
    there once.

    Attention works on tables of `shapes` (rows, keys, queries). `slots_N` lists, table after table,
    the row indices that each of its rows sees: a sequence's tokens up to some (0 in the padding at
    their right). The last `queries` of them are computed, and `home_S` says where among those the
    output for each row token is found: what sequences share asks once where that costs less.

    Response position k is predicted by the hidden state at row index `states_K[k]` and has the
    token `targets_K[k]`. A response's last token predicts nothing, so it is left out unless the
    state after it is asked for.

    Example, the prompt [5, 6] with responses [7, 1] and [8, 9, 1]:
        tokens_S=[5, 6, 7, 8, 9]  positions_S=[0, 1, 2, 2, 3]
        slots_N=[0, 1, 3, 4, 0, 1, 2, 0]  home_S=[4, 5, 6, 2, 3]  shapes=((2, 4, 4),)
        states_K=[1, 2, 1, 3, 4]  targets_K=[7, 1, 8, 9, 1]
    """

    tokens_S: Ints
    positions_S: Ints
    slots_N: Ints
    home_S: Ints
    shapes: Shapes
    states_K: Ints
    targets_K: Ints


@dataclass(frozen=True, eq=False)
class MicroBatch:
    """What one forward and backward pass works on: a packed row, and for its response positions
    what the loss needs.

    Example: MicroBatch(row=PackedRow(…), policy_weight_K=[1, 1, 0, 0, 0], …)
    """

    row: PackedRow
    policy_weight_K: Floats
    value_weight_K: Floats
    ce_weight_K: Floats
    advantages_K: Floats
    returns_K: Floats
    logprobs_K: Floats
    reference_K: Floats
    values_K: Floats


@dataclass(frozen=True)
class MixPlan:
    """What one step is made of: prompts by origin, supervised examples an update, weights of the
    loss terms.

    Example: MixPlan(prompts={"labelled": 8, "verifiable": 24, "unlabelled": 0}, labelled=16,
    mu=0.1, policy_coef=1.0)
    """

    prompts: Mapping[Origin, int]
    labelled: int
    mu: float
    policy_coef: float

    @property
    def total_prompts(self) -> int:
        """Prompts of all origins."""
        return sum(self.prompts.values())


@dataclass(frozen=True)
class Weights:
    """Where a policy version can be fetched, by whoever has the matching receiver; `parts` are
    opaque handles, `digest` is that of all bytes. What is not to be had `again` was sent once.

    Example: Weights(version=12, parts=(ObjectRef(…),), digest="9f2c…", again=True)
    """

    version: int
    parts: tuple[Any, ...]
    digest: str = ""
    again: bool = True
