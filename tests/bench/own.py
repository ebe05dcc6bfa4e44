"""Our own way, and what a learner takes alone."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import pickle
import resource
import statistics
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from ppo_dist import build
from ppo_dist.config import Config
from ppo_dist.data.batching import pack, shares
from ppo_dist.device import DTYPES
from ppo_dist.learner.flops import Cost
from ppo_dist.learner.losses import Tensors
from ppo_dist.models.compiled import compile_layers, why_not
from ppo_dist.models.critic import load_critic
from ppo_dist.models.policy import PolicyModel, load_policy
from ppo_dist.reports import Coefficients
from ppo_dist.run import train
from ppo_dist.tracking.local import read_rows
from ppo_dist.types import Chunk, MicroBatch, Rollout, TrainSequence
from tests.bench.alone import EngineAlone, lengths
from tests.bench.machine import LARGE, LAYER, products, rate, timed, timed_in_turn
from tests.bench.work import Found

STAGES = ("generate", "score", "annotate", "update", "publish", "step")
COEFFICIENTS = Coefficients(
    policy=1.0, value=0.5, mu=0.0, kl=0.0, entropy=0.0, lr=1e-6, critic_lr=1e-6
)


@dataclasses.dataclass
class Seen:
    """What went through the last step of a run; the prompts of every step, as tokens, and how many
    tokens each response to them had.
    """

    prompts: list[list[list[int]]] = dataclasses.field(default_factory=list)
    lengths: list[list[int]] = dataclasses.field(default_factory=list)
    chunks: Sequence[Chunk] = ()
    rollouts: Sequence[Rollout] = ()
    updates: Sequence[Sequence[TrainSequence]] = ()


def run(raw: dict[str, Any], keep: Path) -> Found:
    """A run of ours; what its last step learned from is kept in a file."""
    seen, config = Seen(), Config.model_validate(raw)
    alone = EngineAlone(config) if config.cluster.kind == "local" else None
    real = build.workers

    @contextlib.contextmanager
    def watched(*args: Any) -> Iterator[Any]:
        with real(*args) as parts:
            _listen(seen, *parts[:2])
            if alone:
                alone.listen(parts[1])
            yield parts

    build.workers = watched  # type: ignore[assignment]
    with Processes() as watch:
        assert train(config, resume=False, console=Console(quiet=True)) == 0
    rows = read_rows(Path(config.run.dir) / "metrics.jsonl")[1:]
    rows = [row for row in rows if row["timing_s/step"] is not None]
    more = {}
    if shares := alone.take_from(rows) if alone else []:
        more["generation alone"] = statistics.median(shares)
    seconds = {s: statistics.median(row[f"timing_s/{s}"] or 0.0 for row in rows) for s in STAGES}
    keep.write_bytes(pickle.dumps(seen))
    asked = {"prompts": seen.prompts, "lengths": seen.lengths}
    keep.with_suffix(".json").write_text(json.dumps(asked))
    tokens = statistics.median(
        (row["rollout/tokens"] or 0) + (row.get("sup/tokens") or 0) for row in rows
    )
    for name in ("rollout", "learner"):
        more[f"idle {name}"] = statistics.median(row[f"perf/idle_{name}_share"] for row in rows)
    for name, what in (("rollouts", seen.rollouts), ("training sequences", seen.updates)):
        more[f"bytes of {name}"] = len(pickle.dumps(what))
    if seen.rollouts:  # what is saved at the end is what was published, to the one worker
        saved = (Path(config.run.dir) / "policy").glob("*.safetensors")
        more["bytes of weights"] = sum(file.stat().st_size for file in saved)
    return Found(seconds, tokens, watch.peak, more)


class Processes:
    """The largest memory of this process and of those that it starts, by name, in bytes. Linux
    keeps it, so to look seldom is enough; to look costs what is measured the interpreter's lock.
    """

    def __init__(self) -> None:
        self.peak: dict[str, int] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Processes:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        own = psutil.Process()
        while not self._over.wait(5.0):
            for process in (own, *own.children(recursive=True)):
                with contextlib.suppress(psutil.Error, OSError):
                    name = "driver" if process == own else _name(process.cmdline())
                    self.peak[name] = max(self.peak.get(name, 0), _largest(process.pid))


def _largest(pid: int) -> int:
    """The largest memory that a process has had, in bytes; 0 once it is over."""
    status = Path(f"/proc/{pid}/status").read_text()
    found = (line.split()[1] for line in status.splitlines() if line.startswith("VmHWM:"))
    return 1024 * int(next(found, 0))


def _name(command: Sequence[str]) -> str:
    """A Ray worker's by what it runs, the rest of Ray under one."""
    first = command[0] if command else ""
    return first.split("::")[1].split(".")[0] if "::" in first else "ray"


def _listen(seen: Seen, learners: Any, pool: Any) -> None:
    submit, collect, update = pool.submit, pool.collect, learners.update

    def submitting(chunks: Sequence[Chunk]) -> int:
        seen.chunks = chunks
        asked = (request.prompt for chunk in chunks for request in chunk.requests)
        seen.prompts.append([prompt.tokens_P.tolist() for prompt in asked])
        ticket: int = submit(chunks)
        return ticket

    def collecting(ticket: int) -> list[Rollout]:
        seen.rollouts = collect(ticket)
        seen.lengths.append(lengths(seen.rollouts))
        return list(seen.rollouts)

    def updating(updates: Sequence[Sequence[TrainSequence]], coefficients: Coefficients) -> Any:
        seen.updates = updates
        return update(updates, coefficients)

    pool.submit, pool.collect, learners.update = submitting, collecting, updating


def learner(raw: dict[str, Any], keep: Path, times: int) -> Found:
    """A learner alone on what a run learned from, in turn with the bare forward and backward passes
    of the same micro-batches and with matrix products; its memory beside the sum of its parts.
    """
    config = Config.model_validate(raw)
    seen: Seen = pickle.loads(keep.read_bytes())
    if config.learner.compile:
        why_not("cpu")  # the compiler's own memory is not the learner's
    before = psutil.Process().memory_info().rss
    models = 2 if seen.rollouts else 1  # without rollouts no critic learns
    batches = packed(seen.updates, config.learner.micro_batch_tokens)
    with build.learners(config, str(config.model.path), None) as group:
        annotate = timed(lambda: group.annotate(seen.rollouts), 1) if seen.rollouts else 0.0
        for _ in range(2):
            group.update(seen.updates, COEFFICIENTS)
        used = peak() - before
        passes, saved = bare(config, batches, models)
        update, alone, layer, large = timed_in_turn(
            times,
            lambda: group.update(seen.updates, COEFFICIENTS),
            passes,
            products(config.learner.dtype, LAYER),
            products(config.learner.dtype, LARGE),
        )
    tokens = sum(len(s.tokens_T) for sequences in seen.updates for s in sequences)
    seconds = {"annotate": annotate, "update": update, "bare": alone}
    more = {
        "gemm GFLOP/s": rate(layer, LAYER),
        "large gemm GFLOP/s": rate(large, LARGE),
        "GFLOP": models * flops(config, seen.updates) / 1e9,
    }
    parts = _parts(config, models)
    return Found(
        seconds, tokens, {"learner": used, "parts": parts + saved, "activations": saved}, more
    )


def peak() -> int:
    """The largest memory of this process, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def flops(config: Config, updates: Sequence[Sequence[TrainSequence]]) -> float:
    """Model FLOPs of updates of the policy; the head is at response positions alone."""
    cost = Cost.of(load_policy(str(config.model.path), torch.bfloat16))
    return sum(cost.flops(b.row) for b in packed(updates, config.learner.micro_batch_tokens))


def packed(updates: Sequence[Sequence[TrainSequence]], budget: int) -> list[MicroBatch]:
    """The micro-batches of one learner."""
    made = []
    for sequences in updates:
        rows = [(s.tokens_T, s.prompt_tokens) for s in sequences]
        made += [pack([sequences[i] for i in members]) for members in shares(rows, 1, budget)[0]]
    return made


def bare(
    config: Config, micro_batches: Sequence[MicroBatch], models: int
) -> tuple[Callable[[], None], int]:
    """Forward and backward of all micro-batches by the policy, and by the critic where there are
    two models, without optimizer; and the bytes that autograd keeps of the largest.
    """
    path, dtype = str(config.model.path), DTYPES[config.learner.dtype]
    policy = PolicyModel(load_policy(path, dtype).train(), config.learner.logits_chunk)
    critic = load_critic(path, dtype).train()
    if config.learner.compile:
        for trunk in (policy.lm, critic.trunk):
            compile_layers(trunk)
    batches = [Tensors.of(batch, torch.device("cpu")) for batch in micro_batches]
    ones = [torch.ones(len(b.targets_K)) for b in batches]

    def both() -> None:
        for batch, temperature_K in zip(batches, ones, strict=True):
            out = policy(*batch.row, batch.targets_K, temperature_K)
            (out.logprobs_K * (batch.advantages_K + batch.ce_weight_K)).sum().backward()
            if models == 2:
                critic(*batch.row).square().sum().backward()

    largest = max(range(len(batches)), key=lambda n: len(batches[n].tokens_S))
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = policy(*batches[largest].row, batches[largest].targets_K, ones[largest])
    for parameter in policy.parameters():
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    del out
    return both, sum(kept.values())


def _parts(config: Config, models: int) -> int:
    """Bytes of weights, master weights, gradients and AdamW's two moments of each model that
    learns, and of the reference's weights beside two of them.
    """
    lm = load_policy(str(config.model.path), DTYPES[config.learner.dtype])
    count = sum(p.numel() for p in lm.parameters())  # the critic's trunk has the embeddings too
    each = 2 + 4 + 4 + 8 if config.learner.dtype == "bf16" else 4 + 4 + 8
    weights = 2 if config.learner.dtype == "bf16" else 4
    return each * count * models + weights * count * (models - 1)
