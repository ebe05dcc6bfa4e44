"""Keys of the model and of the data."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ppo_dist.config.base import FilePath, Section


def _bare_path(value: Any) -> Any:
    return {"kind": "file", "path": value} if isinstance(value, str) else value


def _one_or_many(value: Any) -> Any:
    if value is None:
        return []
    return [_bare_path(v) for v in (value if isinstance(value, list) else [value])]


class FromScratch(Section):
    """A GPT-2-architecture model with random weights and a character tokenizer made from the run's
    own data.
    """

    layers: int = Field(4, ge=1, description="transformer blocks")
    hidden: int = Field(192, ge=1, description="width; a multiple of heads")
    heads: int = Field(6, ge=1, description="attention heads")
    context: int = Field(128, ge=8, description="longest sequence, in tokens")

    @model_validator(mode="after")
    def _divides(self) -> FromScratch:
        if self.hidden % self.heads:
            raise ValueError(f"hidden ({self.hidden}) must be a multiple of heads ({self.heads})")
        return self


class Lora(Section):
    """Low-rank adapters in place of the policy's own weights (Hu et al. 2021, arXiv:2106.09685)."""

    rank: int = Field(16, ge=1, description="rank of an adapter's two matrices")
    alpha: float = Field(32.0, gt=0, description="adapters are scaled by alpha / rank")
    targets: Literal["all-linear"] | list[str] = Field(
        "all-linear", description="names of the linear layers that get one; all but the output head"
    )


class Model(Section):
    """The initial policy: a folder, a model of the hub, or a small random one."""

    path: FilePath | None = Field(
        None, description="Hugging Face folder or hub name of the initial policy"
    )
    scratch: FromScratch | None = Field(
        None, description="make a small random model instead of loading one"
    )
    lora: Lora | None = Field(
        None, description="train adapters of the policy, merged where it is published or exported"
    )
    trust_remote_code: bool = Field(
        False, description="let the model folder run its own Python code"
    )

    @model_validator(mode="after")
    def _one(self) -> Model:
        if (self.path is None) == (self.scratch is None):
            raise ValueError("give exactly one of model.path and model.scratch")
        return self


class Reference(Section):
    """The frozen model that the KL is measured against. null: none, which spares its passes and
    `objective/kl`.
    """

    path: FilePath | None = Field(
        None, description="model of the reference policy; null: the run's own policy"
    )
    reset: Literal["after_supervised", "never"] = Field(
        "after_supervised",
        description="the policy as the supervised-first phase left it, or the initial one",
    )


class Critic(Section):
    """The value function of `gae`: a model of its own, or a head on the policy's trunk."""

    path: FilePath | None = Field(
        None, description="model whose trunk starts the critic; null: the policy's trunk"
    )
    shared: bool = Field(
        False, description="a value head on the policy's own trunk instead of a second model"
    )
    warmup: int = Field(
        0, ge=0, description="first steps with rollouts in which the critic alone learns from them"
    )


class Columns(Section):
    """Names of the columns of a file; `prompt` may hold a string or a list of chat messages."""

    prompt: str = Field("prompt", description="column of the prompt: a text, or chat messages")
    response: str = Field("response", description="column of the response to imitate")
    answer: str = Field("answer", description="column of what a checker compares with")


class Shaping(Section):
    """Which rows are taken, and how they become text; templates are Python format strings over the
    row's columns.
    """

    offset: int = Field(0, ge=0, description="so many rows at the beginning are left out")
    limit: int | None = Field(None, ge=1, description="at most so many rows are taken")

    prompt_template: str | None = Field(
        None, description="format string over the row that makes the prompt"
    )
    response_template: str | None = Field(
        None, description="format string over the row that makes the response"
    )


class FileSource(Shaping):
    """A .jsonl, .json or .parquet file."""

    kind: Literal["file"] = "file"
    path: FilePath = Field(description="the file")
    columns: Columns = Columns()


class HubSource(Shaping):
    """A Hugging Face dataset: a hub name, or a folder written by `save_to_disk`."""

    kind: Literal["huggingface"]
    path: FilePath = Field(description="hub name, or folder")
    name: str | None = Field(None, description="configuration of a data set that has several")
    split: str = Field("train", description="its split")
    columns: Columns = Columns()


class GymSource(Shaping):
    """Questions of a reasoning-gym task. A question's own content decides its split, so that splits
    never share one.
    """

    kind: Literal["reasoning_gym"]
    task: str = Field(description="name of the reasoning-gym task")
    size: int = Field(ge=1, description="so many different questions")
    seed: int = Field(0, ge=0, description="other seeds give other questions")
    split: Literal["train", "held_out"] = Field(description="which part of all its questions")
    options: dict[str, Any] = Field({}, description="the task's own settings")


AnySource = Annotated[FileSource | HubSource | GymSource, Field(discriminator="kind")]
Sources = Annotated[list[AnySource], BeforeValidator(_one_or_many)]


class Data(Section):
    """Data sets by what is known of them, and how they become tokens."""

    labelled: Sources = Field(
        [], description="examples to imitate: prompt, response, perhaps answer"
    )
    verifiable: Sources = Field([], description="prompts whose responses a checker can judge")
    unlabelled: Sources = Field(
        [], description="prompts alone; an answer in the file is never read"
    )
    held_out: Sources = Field(
        [],
        description="labelled examples that are only evaluated on; schedules and guard follow it",
    )
    test: Sources = Field(
        [], description="labelled examples that are evaluated on at the end; nothing depends on it"
    )
    chat: bool = Field(
        False, description="put a prompt that is a plain string into the tokenizer's chat template"
    )
    max_prompt_tokens: int = Field(1024, ge=1, description="longest prompt that is taken as it is")
    overlong: Literal["drop", "truncate", "error"] = Field(
        "drop",
        description="what happens to a longer prompt; truncation keeps its end; both are counted",
    )
