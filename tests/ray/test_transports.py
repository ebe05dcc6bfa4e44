"""Rollout workers that die, hang or get spoiled weights: nobody waits for them beyond the deadline,
and what they write afterwards is written by the version that it names.
"""

from __future__ import annotations

import contextlib
import functools
import io
import os
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from rich.console import Console
from transformers import AutoTokenizer

from ppo_dist import build
from ppo_dist.build.engines import engine
from ppo_dist.cluster.layout import layout
from ppo_dist.cluster.pool import Crew, RemoteWorker
from ppo_dist.cluster.session import Places, nodes, reserved
from ppo_dist.config import Config, InputError
from ppo_dist.coordinator.loop import PUBLISH_ATTEMPTS
from ppo_dist.data.chunks import chunks
from ppo_dist.models.policy import load_policy
from ppo_dist.protocols import WeightSender
from ppo_dist.rollout.hf import HfEngine
from ppo_dist.rollout.pool import Pool
from ppo_dist.study.bandwidth import Load, bench_weights
from ppo_dist.transport import collective, disk, wire
from ppo_dist.transport.collective import CollectiveReceiver, CollectiveSender
from ppo_dist.transport.disk import DiskReceiver, DiskSender
from ppo_dist.transport.store import StoreReceiver, StoreSender
from ppo_dist.types import Prompt, Sampling
from tests.conftest import raw_config

DEADLINE_S = 12.0
SLOW = [pytest.param(kind, marks=pytest.mark.slow) for kind in ("store", "disk")]
KINDS = ["collective", *SLOW]
PROMPTS = [Prompt(f"p:{i}", "verifiable", "", np.arange(3, 5 + i)) for i in range(8)]
CHUNKS = chunks(PROMPTS, 2, 2, 2, version=1, sampling=Sampling(1.0, 8, 0, "train"))


class Rig:
    """Two rollout workers, and the sender of their weights in this process."""

    def __init__(self, sender: WeightSender, workers: Sequence[RemoteWorker], model: Path) -> None:
        self.sender, self.workers = sender, workers
        self.events: list[dict[str, Any]] = []
        self.pool = Pool(workers, keep=2, note=self._note, late_s=DEADLINE_S / 2)
        self._lm = load_policy(str(model), torch.float32)
        self._engine = HfEngine(
            load_policy(str(model), torch.float32),
            AutoTokenizer.from_pretrained(model),
            frozenset({1}),
            torch.device("cpu"),
        )

    def _note(self, event: str, **details: Any) -> None:
        self.events.append({"event": event, **details})

    def weights(self, version: int) -> list[tuple[str, torch.Tensor]]:
        """Of each version others, and far from the others'."""
        generator = torch.Generator().manual_seed(version)
        return [
            (name, p.detach() + 0.5 * torch.randn(p.shape, generator=generator))
            for name, p in self._lm.named_parameters()
        ]

    def publish(self, version: int) -> float:
        """Publishes a version until a worker has it, as the loop does; how long that took."""
        begin = time.monotonic()
        for _ in range(PUBLISH_ATTEMPTS):
            if self.pool.load(self.sender.publish(version, self.weights(version))):
                return time.monotonic() - begin
        raise AssertionError(self.events)

    def check(self, version: int) -> None:
        """All that both workers write with a version is what that version writes."""
        work = [replace(chunk, version=version) for chunk in CHUNKS]
        rollouts = self.pool.collect(self.pool.submit(work))
        self._engine.load(version, self.weights(version))
        expected = [rollout for chunk in work for rollout in self._engine.generate(chunk)]
        for got, wanted in zip(rollouts, expected, strict=True):
            assert got.version == version
            assert got.tokens_R.tolist() == wanted.tokens_R.tolist()
            np.testing.assert_allclose(got.logprobs_R, wanted.logprobs_R, atol=1e-4)

    def wait_for_the_new_one(self) -> None:
        end = time.monotonic() + 60
        while not any(event["event"] == "rollout_worker_restarted" for event in self.events):
            assert time.monotonic() < end, self.events
            time.sleep(0.1)

    def pid(self, number: int) -> int:
        return ray.get(self.workers[number]._actor.__ray_call__.remote(lambda self: os.getpid()))


@pytest.fixture(params=KINDS)
def rig(
    request: pytest.FixtureRequest,
    ray_session: None,
    tmp_path: Path,
    tiny_models: dict[str, Path],
) -> Iterator[Rig]:
    raw = raw_config(
        tmp_path,
        cluster={"kind": "ray"},
        rollout={"workers": 2, "max_new_tokens": 8},
        transport={"kind": request.param, "deadline_s": DEADLINE_S},
    )
    config = Config.model_validate(raw)
    sender, receiver = ends(request.param, tmp_path)
    with build.cluster(config), _places(config) as places:
        make_engine = engine(config, str(tiny_models["gpt2"]), "cpu")
        crew = Crew(config, places, make_engine, receiver)
        workers = [RemoteWorker(crew, slot) for slot in places.slots]
        for worker in workers:
            worker.wait()
        made = Rig(sender, workers, tiny_models["gpt2"])
        with contextlib.closing(made.pool):
            made.publish(1)
            made.check(1)
            yield made


@contextlib.contextmanager
def _places(config: Config) -> Iterator[Places]:
    with reserved(config, layout(config, nodes(), has_learners=False)) as (_, places, _):
        yield places


def ends(kind: str, folder: Path) -> tuple[Any, Any]:
    """The sender, and what makes a receiver."""
    if kind == "store":
        return StoreSender(2**12), StoreReceiver
    if kind == "disk":
        return DiskSender(folder / "weights", 2**12, keep=2), DiskReceiver
    half_s = DEADLINE_S / 2
    sender = CollectiveSender("cpu", 2**12, half_s)
    return sender, functools.partial(
        CollectiveReceiver, "cpu", "127.0.0.1", sender.port, half_s, keep=2
    )


@pytest.mark.slow
def test_a_dead_worker_is_replaced_and_serves_only_what_it_was_given(rig: Rig) -> None:
    ray.kill(rig.workers[0]._actor)
    assert rig.publish(2) < DEADLINE_S
    rig.check(2)
    rig.wait_for_the_new_one()
    ray.kill(rig.workers[1]._actor)  # so that the new one has to do it
    rig.publish(3)
    rig.check(3)


@pytest.mark.slow
def test_a_worker_that_hangs_holds_nobody_up(rig: Rig) -> None:
    pid = rig.pid(0)
    os.kill(pid, signal.SIGSTOP)
    assert rig.publish(2) < DEADLINE_S
    rig.check(2)
    rig.wait_for_the_new_one()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)
    rig.publish(3)
    rig.check(3)


def test_spoiled_weights_are_never_served(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        for module in (wire, collective, disk):
            patched.setattr(module, "digest", lambda raw: "0" * 16)
        weights = rig.sender.publish(2, rig.weights(2))
    assert not rig.pool.load(weights)
    assert len(rig.events) == 2 and all("changed" in event["reason"] for event in rig.events)
    rig.publish(2)  # what the loop does then
    rig.check(2)


@pytest.mark.slow
def test_bandwidth_is_measured_from_end_to_end(ray_session: None) -> None:
    console = Console(file=io.StringIO(), record=True, width=100)
    assert bench_weights(Load(8, workers=1, bucket_mb=1, repeats=2), ["store"], console) == 0
    (row,) = [line for line in console.export_text().splitlines() if "store" in line]
    assert float(row.split("│")[2]) > 0
    with pytest.raises(InputError, match="pigeon is not one of"):
        bench_weights(Load(8, workers=1, bucket_mb=1, repeats=2), ["pigeon"], console)
