"""Keys of the rewards, one section per kind."""

from __future__ import annotations

from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import BeforeValidator, Field, field_validator, model_validator

from ppo_dist.config.base import FilePath, Section, bare_kind


class Extract(Section):
    """Takes the answer out of a response: all of it, its first line, its last number, or what
    stands in its last \\boxed{}, read by math-verify.
    """

    kind: Literal["text", "last_number", "first_line", "boxed"] = "text"


class ExtractAfter(Section):
    """What stands on the same line after the last `marker`."""

    kind: Literal["after"]
    marker: str = Field(min_length=1, description="the text that stands before the answer")


class FunctionOf(Section):
    """A function of your own, loaded from a Python file: `name(text) -> str | None`."""

    kind: Literal["function"]
    path: FilePath = Field(description="the Python file; it is run")
    name: str = Field(description="the function in it")


AnyExtract = Annotated[
    Annotated[Extract | ExtractAfter | FunctionOf, Field(discriminator="kind")],
    BeforeValidator(bare_kind),
]


EXTRACTED = "what the answer of a response is"


class ExactReward(Section):
    """1 if the extracted text equals the answer (white space at both ends aside), or what is
    extracted from that, else 0.
    """

    kind: Literal["exact"]
    extract: AnyExtract = Field(Extract(), description=EXTRACTED)
    ignore_case: bool = Field(False, description="capital letters are as good as small ones")


class NumericReward(Section):
    """1 if the extracted number is within `tolerance` of the answer, else 0. An answer that is no
    number has the one that is extracted from it.
    """

    kind: Literal["numeric"]
    extract: AnyExtract = Field(Extract(kind="last_number"), description=EXTRACTED)
    tolerance: float = Field(1e-6, ge=0, description="largest difference that counts as none")


class RegexReward(Section):
    """1 if `pattern` is found in the response, else 0. Sees no answer."""

    kind: Literal["regex"]
    pattern: str = Field(description="a regular expression of Python's")


class VoteReward(Section):
    """1 if the extracted answer is the one that most responses to the prompt have, else 0 (TTRL,
    Zuo et al. 2025, arXiv:2504.16084). Sees no answer. Where no answer has the most votes, nothing
    is learned from the prompt.
    """

    kind: Literal["vote"]
    extract: AnyExtract = Field(Extract(), description=EXTRACTED)
    leave_one_out: bool = Field(
        False, description="compare each response with the majority of the others"
    )


class GymReward(Section):
    """The reasoning-gym task's own score of the extracted answer, 0 to 1. `strict` counts only a
    full score.
    """

    kind: Literal["reasoning_gym"]
    extract: AnyExtract = Field(Extract(), description=EXTRACTED)
    strict: bool = Field(True, description="a partial score counts as 0")


class MathReward(Section):
    """1 if the response's answer equals the prompt's as mathematics, by math-verify, else 0."""

    kind: Literal["math"]


class FunctionReward(Section):
    """A function of your own, loaded from a Python file: `name(prompt, response, answer) -> float`,
    three texts. Without `needs_answer` rows need none, and `answer` is None for unlabelled prompts.
    """

    kind: Literal["function"]
    path: FilePath = Field(description="the Python file; it is run")
    name: str = Field(description="the function in it")
    needs_answer: bool = Field(True, description="false: rows need no answer")


class ModelReward(Section):
    """The number that a sequence-classification model with one output gives to prompt and response.
    Sees no answer. A model with another tokenizer than the policy's reads both as text.
    """

    kind: Literal["model"]
    path: FilePath = Field(description="Hugging Face folder, or a name on the hub")
    dtype: Literal["fp32", "bf16"] = Field("fp32", description="number format of its weights")
    compile: bool = Field(
        False, description="fuse what is between matrix products, as learner.compile does"
    )
    batch_tokens: int = Field(8192, ge=1, description="tokens read in one forward pass")
    workers: int = Field(1, ge=1, description="processes that have the model")
    threads: int = Field(1, ge=1, description="CPU threads of a worker")
    cpus: float = Field(1, ge=0, description="CPUs that a worker reserves in the cluster")
    deadline_s: float = Field(
        1800,
        gt=0,
        description="how long a worker may take to load the model and to judge a step's responses;"
        " one that takes longer is taken for hung, and replaced",
    )


class RemoteReward(Section):
    """The number that a server gives to prompt, response and answer, over HTTP. What is sent and
    what must come back stands in ppo_dist/rewards/remote.py.

    A step waits at most ⌈batches / concurrency⌉ · (attempts · timeout_s + (attempts − 1) ·
    max_pause_s) for it.
    """

    kind: Literal["remote"]
    url: str = Field(
        description="where requests are posted to; it is logged, so no secret is in it"
    )
    needs_answer: bool = Field(True, description="send the answers, too; false: none leaves")
    batch: int = Field(16, ge=1, description="responses in a request")
    concurrency: int = Field(8, ge=1, description="requests under way at a time")
    timeout_s: float = Field(30.0, gt=0, description="for a request, from connecting to its end")
    attempts: int = Field(
        4, ge=1, le=20, description="how often a request is made before it failed"
    )
    backoff_s: float = Field(
        0.5,
        ge=0,
        description="longest pause before the second attempt; then twice as long each time",
    )
    max_pause_s: float = Field(
        30.0, ge=0, description="no pause is longer, whatever the server asks for (Retry-After)"
    )
    max_response_bytes: int = Field(1_000_000, ge=1, description="a longer answer is refused")
    on_failure: Literal["fail", "drop"] = Field(
        "fail",
        description="without an answer: end the run, which can be resumed; or leave the responses "
        "out, so that they count nowhere but in reward/dropped",
    )
    token_env: str | None = Field(
        None, min_length=1, description="environment variable that holds a bearer token"
    )
    ca_file: str | None = Field(
        None, description="PEM file of the authorities to trust, in place of the system's"
    )

    @field_validator("url")
    @classmethod
    def _is_whole(cls, url: str) -> str:
        try:
            parts = urlsplit(url)
            is_whole = bool(
                url.startswith(("http://", "https://")) and parts.hostname and parts.port != 0
            )
        except ValueError:  # its message would repeat what may be a password
            is_whole = False
        if not is_whole or any(map(str.isspace, url)):
            raise ValueError("must be an address such as https://judge.example:8000/score")
        if "@" in parts.netloc:
            raise ValueError("must hold no user or password: it is logged. See token_env")
        return url

    @model_validator(mode="after")
    def _goes_together(self) -> RemoteReward:
        if self.url.startswith("https:"):
            return self
        if self.ca_file is not None:
            raise ValueError("ca_file has no effect on http: url must begin with https")
        is_here = urlsplit(self.url).hostname in ("localhost", "127.0.0.1", "::1")
        if self.token_env is not None and not is_here:
            raise ValueError("token_env would be read on its way: url must begin with https")
        return self


class WeightedReward(Section):
    """Sum of `weight · reward` over `parts`."""

    kind: Literal["weighted"]
    parts: list[WeightedPart] = Field(min_length=1, description="what is added up")


AnyReward = Annotated[
    Annotated[
        ExactReward
        | NumericReward
        | MathReward
        | RegexReward
        | VoteReward
        | GymReward
        | FunctionReward
        | ModelReward
        | RemoteReward
        | WeightedReward,
        Field(discriminator="kind"),
    ],
    BeforeValidator(bare_kind),
]


class WeightedPart(Section):
    """A source of rewards within a weighted sum."""

    weight: float = Field(description="what its reward is multiplied by")
    reward: AnyReward = Field(description="any kind of reward")


class Reward(Section):
    """What judges the responses to each kind of prompt."""

    labelled: AnyReward | None = Field(
        None, description="reward of responses to labelled and held-out prompts"
    )
    verifiable: AnyReward | None = Field(
        None, description="reward of responses to verifiable prompts"
    )
    unlabelled: AnyReward | None = Field(
        None, description="reward of responses to unlabelled prompts; sees no answer"
    )
    on_error: Literal["error", "zero"] = Field(
        "zero",
        description="a checker that raises or returns nonsense: stop with the row, or count 0",
    )
