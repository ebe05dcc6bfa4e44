"""The workloads, and what a contender tells of one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Work:
    """One iteration, several times after a small one that does not count.

    Example: Work(name="W1", prompts=32, responses=1, max_new_tokens=48, iterations=3)
    """

    name: str
    prompts: int
    responses: int
    max_new_tokens: int
    iterations: int
    dtype: str = "bf16"
    micro_batch: int = 8
    minibatches: int = 2

    @property
    def sequences(self) -> int:
        """Responses of an iteration."""
        return self.prompts * self.responses

    def within(self, seconds: float, gflops: float) -> Work:
        """With as many iterations, at least one and at most its own number, as all contenders
        should have done in that time on a machine of this matrix rate.
        """
        tokens = self.sequences * (PROMPT_TOKENS + 0.7 * self.max_new_tokens)
        own = 12 * PARAMETERS * tokens / (REACHED[self.dtype] * gflops * 1e9)
        return replace(self, iterations=max(1, min(self.iterations, int(seconds / (5 * own)))))


W1 = Work("W1", prompts=32, responses=1, max_new_tokens=48, iterations=3)
# a quarter of the prompts that the peers were measured with: their way of padding takes minutes
W2 = Work("W2", prompts=8, responses=4, max_new_tokens=256, iterations=2)
# in fp32, as the quick start is
W3 = Work("W3", prompts=256, responses=1, max_new_tokens=16, iterations=12, dtype="fp32")
W4 = Work("W4", prompts=0, responses=1, max_new_tokens=1, iterations=3)
EACH = 4  # W5: sequences of a rollout worker in a step
KL = 0.05  # its coefficient in the reward
LR = 1e-6
WARM_UP = 4  # one in so many prompts is in the iteration that does not count
PARAMETERS, PROMPT_TOKENS = 135e6, 70  # of SmolLM2 and of a sum as a chat, to guess a time
REACHED = {"fp32": 0.65, "bf16": 0.3}  # of a matrix product's rate, about, in an iteration


@dataclass(frozen=True)
class Found:
    """Medians over the iterations: seconds by stage, tokens written, tokens in training sequences;
    the largest memory of each process in bytes; GFLOP/s of a matrix product, before and after.

    Example: Found(seconds={"generate": 3.1, "step": 21.0}, tokens=1088, peak={"all": 5 * 10**9})
    """

    seconds: dict[str, float]
    tokens: float
    peak: dict[str, int] = field(default_factory=dict)
    more: dict[str, float] = field(default_factory=dict)
    machine: tuple[float, ...] = ()


def sums(size: int, seed: int) -> dict[str, Any]:
    """reasoning-gym's chain_sum as a data section."""
    return {
        "kind": "reasoning_gym",
        "task": "chain_sum",
        "size": size,
        "seed": seed,
        "split": "train",
    }


def own_config(
    work: Work, folder: Path, model: Path, reward: Path, threads: int, compiled: bool
) -> dict[str, Any]:
    """W1 or W2 as a config of ours: everything in one process, as the plain program is."""
    prompts = {"kind": "piecewise", "values": [[0, work.prompts // WARM_UP], [1, work.prompts]]}
    judge = {"kind": "model", "path": str(reward), "dtype": work.dtype}
    judge |= {"threads": threads, "compile": compiled}
    return {
        **_common(work, folder, threads, compiled),
        "model": {"path": str(model)},
        "data": {"verifiable": sums(2000, 1), "chat": True},
        "reward": {"verifiable": judge},
        "mix": {"schedule": 0.0, "prompts": prompts, "labelled_batch": 0},
        "algorithm": {"minibatches": work.minibatches, "kl": KL},
        "cluster": {"kind": "local"},
    }


def small_config(work: Work, folder: Path) -> dict[str, Any]:
    """W3: the quick start's model, Ray, two learners and a rollout worker of a thread each: the
    latter writes for a fifth of the time, so that three processes keep two cores busy.
    """
    words = {
        "kind": "reasoning_gym",
        "task": "spell_backward",
        "prompt_template": "{word}>",
        "split": "train",
    }
    raw = _common(work, folder, threads=1)
    return {
        **raw,
        "model": {"scratch": {"layers": 4, "hidden": 192, "heads": 6, "context": 32}},
        "data": {
            "labelled": {**words, "size": 200, "seed": 1},
            "verifiable": {**words, "size": 4000, "seed": 2},
        },
        "reward": {"labelled": "exact", "verifiable": "reasoning_gym"},
        "mix": {"schedule": 0.1, "prompts": work.prompts, "labelled_batch": 32},
        "algorithm": {"minibatches": work.minibatches},
        "stream": {"max_lag": 1},
        "learner": {**raw["learner"], "workers": 2},
        "cluster": {"cpus": 3},
    }


def supervised_config(
    work: Work, folder: Path, model: Path, threads: int, compiled: bool
) -> dict[str, Any]:
    """W4: 32 labelled examples an update, and nothing else."""
    return {
        **_common(work, folder, threads, compiled),
        "model": {"path": str(model)},
        "data": {"labelled": sums(500, 1), "chat": True},
        "mix": {"schedule": 1.0, "prompts": 0, "labelled_batch": 32},
        "cluster": {"kind": "local"},
    }


def _common(work: Work, folder: Path, threads: int, compiled: bool = False) -> dict[str, Any]:
    return {
        "run": {"dir": str(folder)},
        "train": {"steps": work.iterations + 1},
        "rollout": {
            "group_size": work.responses,
            "max_new_tokens": work.max_new_tokens,
            "chunk": max(work.sequences, 1),
            "threads": threads,
        },
        "learner": {
            "dtype": work.dtype,
            "compile": compiled,
            "zero_stage": 0,  # one learner has nothing to share out
            "threads": threads,
            "lr": LR,
            "critic_lr": LR,
        },
        "tracking": {"wandb": "off", "progress": False},
    }
