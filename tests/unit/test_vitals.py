"""What a process takes, and how much there is to compute."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from ppo_dist import device
from ppo_dist.data.batching import pack_rows
from ppo_dist.learner.flops import Cost, Rate
from ppo_dist.models.critic import load_critic
from ppo_dist.vitals import Pulse


def test_a_process_tells_what_it_takes_with_its_children() -> None:
    pulse = Pulse()
    before = pulse.vitals()
    kept = np.ones(50_000_000)  # 0.4 GB
    code = "import time; kept = bytearray(300_000_000); print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None and child.stdout.readline()
        pulse.add(0.5)
        pulse.add(0.25)
        end = time.perf_counter() + 0.3
        while time.perf_counter() < end:
            pass
        after = pulse.vitals()
        child.kill()
    assert len(kept) and after.memory and before.memory
    assert 0.6e9 < after.memory - before.memory < 1e9
    assert after.busy_s == 0.75 and pulse.vitals().busy_s == 0.0
    assert after.seconds >= 0.3 and 0.1 < after.cpu_s / after.seconds < 3.0


def test_the_cost_of_a_model(tiny_models: dict[str, Path]) -> None:
    lm = AutoModelForCausalLM.from_pretrained(tiny_models["llama"])
    cost = Cost.of(lm)
    layer = 4 * 32 * 32 - 2 * 32 * 16 + 3 * 32 * 64 + 2 * 32  # two of four key-value heads
    vocabulary = lm.config.vocab_size
    assert cost == Cost(6 * (2 * layer + 32), 6 * vocabulary * 32, 2 * 32)
    lm.requires_grad_(False)
    assert Cost.of(lm).trunk == 4 * (2 * layer + 32), "as where adapters are trained alone"
    trunk = Cost.of(load_critic(str(tiny_models["llama"]), torch.float32).trunk)
    assert trunk == Cost(cost.trunk, 0, cost.width), "a critic has no head over the vocabulary"


def test_the_flops_of_a_packed_row_by_hand() -> None:
    rows = [(np.array([1, 2, 3, 4]), 2), (np.array([1, 2, 5]), 2)]
    found = Cost(trunk=10, head=5, width=2).flops(pack_rows(rows, end=True))
    # the prompt's two tokens once, that see one and two, and responses that see 3, 4 and 3
    assert found == 10 * 5 + 5 * 5 + 12 * 2 * (1 + 2 + 3 + 4 + 3)


def test_a_rate_is_of_the_last_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ppo_dist.device.matrix_rate", lambda where, dtype: 100.0)
    times = iter([1.0, 3.0, 5.0, 6.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(times))
    rate = Rate(torch.device("cpu"), "fp32")
    with rate.measured():
        rate.add(20.0)
        rate.add(30.0)
    assert rate.mfu == 0.25
    with rate.measured():
        pass
    assert rate.mfu is None, "nothing was learned"


def test_a_matrix_product_has_a_rate() -> None:
    assert 1e8 < device.matrix_rate(torch.device("cpu"), torch.float32) < 1e15
