"""Keys of the rewards, one section per kind."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from ppo_dist.config.base import Section, bare_kind


class Extract(Section):
    """Takes the answer out of a response."""

    kind: Literal["text", "last_number", "first_line", "after"] = "text"
    marker: str = Field("", description="for `after`: the text that stands before the answer")

    @model_validator(mode="after")
    def _marked(self) -> Extract:
        if (self.kind == "after") != bool(self.marker):
            raise ValueError("`marker` goes with kind `after`, and with no other")
        return self


AnyExtract = Annotated[Extract, BeforeValidator(bare_kind)]


class ExactReward(Section):
    """1 if the extracted text equals the answer (white space at both ends aside), else 0."""

    kind: Literal["exact"]
    extract: AnyExtract = Extract()
    ignore_case: bool = False


class NumericReward(Section):
    """1 if the extracted number is within `tolerance` of the answer, else 0."""

    kind: Literal["numeric"]
    extract: AnyExtract = Extract(kind="last_number")
    tolerance: float = Field(1e-6, ge=0)


class RegexReward(Section):
    """1 if `pattern` is found in the response, else 0. Sees no answer."""

    kind: Literal["regex"]
    pattern: str


class GymReward(Section):
    """The reasoning-gym task's own score of the extracted answer, 0 to 1. `strict` counts only a
    full score.
    """

    kind: Literal["reasoning_gym"]
    extract: AnyExtract = Extract()
    strict: bool = True


class WeightedReward(Section):
    """Sum of `weight · reward` over `parts`."""

    kind: Literal["weighted"]
    parts: list[WeightedPart] = Field(min_length=1)


AnyReward = Annotated[
    Annotated[
        ExactReward | NumericReward | RegexReward | GymReward | WeightedReward,
        Field(discriminator="kind"),
    ],
    BeforeValidator(bare_kind),
]


class WeightedPart(Section):
    weight: float
    reward: AnyReward


class Reward(Section):
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
