"""What every block of keys is made of: the section, the error a user sees, numbers that may change
with the step.
"""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

Origin = Literal["labelled", "verifiable", "unlabelled"]
ORIGINS: tuple[Origin, ...] = ("labelled", "verifiable", "unlabelled")


class InputError(Exception):
    """A config, data file or request that the user must mend: printed as one line, exit code 2."""

    def __init__(self, message: str) -> None:
        # what is wrong is quoted, whatever it holds
        super().__init__("".join(c if c.isprintable() else ascii(c)[1:-1] for c in message))


class RunError(Exception):
    """A run whose workers failed for good: printed as one line, exit code 1; it can be resumed."""


class WorkersLost(RunError):
    """What only the learners know is gone with them: a run can go on from its last checkpoint."""


def _as_path(value: str) -> str:
    try:
        parts = os.fsencode(value).split(b"/")
    except UnicodeEncodeError:
        raise ValueError("no file can have this name: it holds half of a character") from None
    if not value or "\0" in value or max(map(len, parts)) > 255 or len(value) > 4000:
        raise ValueError("no file can have this name")
    return value


FilePath = Annotated[str, AfterValidator(_as_path)]


class Section(BaseModel):
    """A block of keys: unknown ones are refused, values do not change after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


def bare_kind(value: Any) -> Any:
    """A bare string as a part of that kind with its defaults; YAML reads a bare `off` as false."""
    value = "off" if value is False else value
    return {"kind": value} if isinstance(value, str) else value


def bare_number(value: Any) -> Any:
    """A number, also one that YAML reads as a string (1e-5), as a constant schedule."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return {"kind": "constant", "value": value} if is_number else value


class Constant(Section):
    """The same number at every step, after a rise from 0 in `warmup` steps; may be written as the
    bare number.
    """

    kind: Literal["constant"] = "constant"
    value: float = Field(ge=0)
    warmup: int = Field(0, ge=0)


class Linear(Section):
    """Up from 0 to `start` in `warmup` steps, then to `end` over `steps`, `end` afterwards."""

    kind: Literal["linear"]
    start: float = Field(ge=0)
    end: float = Field(ge=0)
    warmup: int = Field(0, ge=0)
    steps: int = Field(gt=0)


class Cosine(Section):
    """Up from 0 to `peak` in `warmup` steps, then down a half cosine to `floor` over `steps`,
    `floor` afterwards.
    """

    kind: Literal["cosine"]
    peak: float = Field(ge=0)
    floor: float = Field(0.0, ge=0)
    warmup: int = Field(0, ge=0)
    steps: int = Field(gt=0)


class Piecewise(Section):
    """`values` is a list of [first step, value]; the last one whose first step has come holds."""

    kind: Literal["piecewise"]
    values: list[tuple[Annotated[int, Field(ge=0)], Annotated[float, Field(ge=0)]]] = Field(
        min_length=1
    )

    @model_validator(mode="after")
    def _ordered(self) -> Piecewise:
        firsts = [first for first, _ in self.values]
        if firsts[0] != 0 or firsts != sorted(set(firsts)):
            raise ValueError("the first steps must begin at 0 and rise")
        return self


AnyScalar = Annotated[Constant | Linear | Cosine | Piecewise, Field(discriminator="kind")]
Scalar = Annotated[AnyScalar, BeforeValidator(bare_number)]


class Adaptive(Section):
    """A bounded proportional controller on the held-out set.

    Let x be the labelled responses' mean negative log-likelihood a token (`nll`), or 1 − greedy
    accuracy (`accuracy`), now, at best so far, and at first. The number is
    max(low, start · exp(−gain·(x_first − x_best))) · exp(gain·(x − x_best)), at most `high`: it
    falls as the policy gets better than it ever was, and is raised while it is worse.
    """

    kind: Literal["adaptive"]
    start: float = Field(gt=0)
    low: float = Field(gt=0)
    high: float = Field(gt=0)
    gain: float = Field(2.0, gt=0)
    signal: Literal["nll", "accuracy"] = "nll"

    @model_validator(mode="after")
    def _bounded(self) -> Adaptive:
        if not self.low <= self.start <= self.high:
            raise ValueError("low ≤ start ≤ high must hold")
        return self


AnyMixScalar = Annotated[
    Constant | Linear | Cosine | Piecewise | Adaptive, Field(discriminator="kind")
]
MixScalar = Annotated[AnyMixScalar, BeforeValidator(bare_number)]


class SupervisedFirst(Section):
    """`steps` of supervised loss alone with weight `mu`, then the mix, whose weight follows `then`
    (step 0 = its first).
    """

    kind: Literal["supervised_first"]
    steps: int = Field(gt=0)
    mu: float = Field(1.0, gt=0)
    then: MixScalar = Constant(value=0.1)


MuSchedule = Annotated[
    Annotated[
        Constant | Linear | Cosine | Piecewise | Adaptive | SupervisedFirst,
        Field(discriminator="kind"),
    ],
    BeforeValidator(bare_number),
]


def peak(scalar: AnyMixScalar) -> float:
    """The largest value that a scheduled number takes."""
    match scalar:
        case Constant():
            return scalar.value
        case Linear():
            return max(scalar.start, scalar.end)
        case Cosine():
            return max(scalar.peak, scalar.floor)
        case Piecewise():
            return max(value for _, value in scalar.values)
        case Adaptive():
            return scalar.high
