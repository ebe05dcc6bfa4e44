"""The schema of a label-efficiency study: methods × label budgets × seeds × tasks."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, model_validator

from ppo_dist.config.base import FilePath, Section
from ppo_dist.config.workers import Cluster, WandbMode

# they name files in the study's folder
Name = Annotated[str, Field(pattern=r"^\w[^/\x00-\x1f]*$", max_length=100)]
Percent = Annotated[float, Field(gt=0, le=100)]


class Method(Section):
    """A training config and the label budgets at which it is run."""

    config: FilePath = Field(description="training config, relative to the study's own file")
    labels: list[Percent] = Field(min_length=1, description="per cent of the pool")


class Study(Section):
    """What `ppo-dist label-efficiency` runs.

    With a budget of n labels, a cell learns from the first n rows of `data.labelled`, and
    `data.unlabelled` has the others. Both must describe the same pool.
    """

    dir: FilePath = Field(description="where finished cells, table and figure are kept")
    pool: int = Field(ge=1, description="prompts that could be labelled")
    seeds: list[Annotated[int, Field(ge=0)]] = Field(
        min_length=1, description="each a pool of its own, and a run of every method"
    )
    methods: dict[Name, Method] = Field(min_length=1, description="by name, what is compared")
    tasks: dict[Name, dict[str, Any]] = Field(
        min_length=1, description="by name, what a task changes in the base of all methods"
    )
    cluster: Cluster = Cluster()
    cpus: float = Field(1, gt=0, description="CPUs that a cell reserves in the cluster")
    wandb: WandbMode = Field("off", description="as tracking.wandb, of each cell")
    project: str = Field("ppo_dist", description="W&B project")

    @model_validator(mode="after")
    def _budgets(self) -> Study:
        for name, method in self.methods.items():
            for percent in method.labels:
                if round(self.pool * percent / 100) < 1:
                    raise ValueError(f"methods.{name}.labels: {percent} % of {self.pool} is none")
        return self
