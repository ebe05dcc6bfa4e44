"""How fast an iteration is, against a plain program on the same work and against the machine."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from tests.bench import report
from tests.bench.work import (
    W1,
    W2,
    W3,
    W4,
    WARM_UP,
    Found,
    Work,
    own_config,
    small_config,
    supervised_config,
)


def has_trl() -> bool:
    """Whether a TRL that still has a PPOTrainer is installed; nothing is imported."""
    spec = importlib.util.find_spec("trl")
    folders = spec.submodule_search_locations if spec else None
    return any((Path(folder) / "experimental/ppo").is_dir() for folder in folders or ())


@dataclass(frozen=True)
class Bench:
    """Where and with what it is measured."""

    model: Path
    folder: Path
    threads: int
    dtype: str
    compiled: bool
    found: dict[str, dict[str, Any]] = field(default_factory=dict)  # by workload and contender

    def measure(self, name: str, kind: str, **job: Any) -> Found:
        """What a contender measures, in a process of its own."""
        folder = self.folder / name
        folder.mkdir(parents=True, exist_ok=True)
        asked, out = folder / f"{kind}.json", folder / f"{kind}-found.json"
        common = {"kind": kind, "threads": self.threads, "dtype": self.dtype}
        asked.write_text(json.dumps({**common, **job}))
        threads = str(self.threads)
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "tests.bench.child", str(asked), str(out)]
        begin = time.perf_counter()
        with (folder / f"{kind}.log").open("w") as log:
            done = subprocess.run(command, env=environment, stdout=log, stderr=log)
        if done.returncode:
            raise SystemExit(f"{name} {kind}: failed; see {log.name}")
        print(f"{name} {kind}: {time.perf_counter() - begin:.0f} s", flush=True)
        self.found.setdefault(name, {})[kind] = numbers = json.loads(out.read_text())
        return Found(**numbers)

    @property
    def _how(self) -> tuple[int, bool]:
        return self.threads, self.compiled

    def fresh(self, name: str) -> Path:
        """The folder of a workload, without what an earlier run left there."""
        shutil.rmtree(self.folder / name, ignore_errors=True)
        return self.folder / name

    def reward_model(self) -> Path:
        """One of the policy's shape: its trunk and a random head."""
        folder = self.folder / "reward"
        if not folder.exists():
            code = (
                "import sys, torch, transformers as t; torch.manual_seed(0); "
                "m = t.AutoModelForSequenceClassification.from_pretrained("
                "sys.argv[1], num_labels=1, dtype=torch.bfloat16); "
                "m.config.pad_token_id = m.config.eos_token_id; m.save_pretrained(sys.argv[2]); "
                "t.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])"
            )
            subprocess.run([sys.executable, "-c", code, self.model, folder], check=True)
        return folder

    def iterations(self, work: Work) -> str:
        """W1 or W2."""
        reward, own = self.reward_model(), self.fresh(work.name)
        keep = str(own / "seen.pickle")
        found = {}
        for kind in ("own", "learner"):
            raw = own_config(work, own / kind, self.model, reward, *self._how)
            job = {"config": raw, "keep": keep, "times": work.iterations}
            found[kind] = self.measure(work.name, kind, **job)
        prompts = str(own / "seen.json")
        peer = {"work": asdict(work), "model": str(self.model), "reward": str(reward)}
        for kind in ("plain", "trl") if has_trl() else ("plain",):
            found[kind] = self.measure(work.name, kind, **peer, prompts=prompts)
        return report.iteration(work.name, found)

    def small(self, work: Work) -> str:
        """W3."""
        own = self.fresh(work.name)
        raw = small_config(work, own / "run")
        return report.small(self.measure("W3", "own", config=raw, keep=str(own / "seen.pickle")))

    def supervised(self, work: Work) -> str:
        """W4."""
        own, found = self.fresh(work.name), {}
        for kind in ("own", "learner"):
            raw = supervised_config(work, own / kind, self.model, *self._how)
            keep = str(own / "seen.pickle")
            job = {"config": raw, "keep": keep, "times": work.iterations}
            found[kind] = self.measure(work.name, kind, **job)
        return report.supervised(found)

    def scaling(self) -> str:
        """W5."""
        found = self.measure("W5", "scaling")
        report.plot(found, self.folder / "scaling.png")
        return report.scaling(found)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__)
    parser.add_argument("works", nargs="*", help="W1 to W5; all of them if none is named")
    parser.add_argument("--model", type=Path, default=Path("models/smollm2-135m"))
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="a folder")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="in all")
    parser.add_argument("--dtype", choices=["fp32", "bf16"], help="the faster one if not given")
    parser.add_argument("--compile", action="store_true", help="W1, W2 and W4 with learner.compile")
    parser.add_argument(
        "--minutes",
        type=float,
        default=10,
        help="about so long for all five, without TRL: fewer iterations, at least one each, on a "
        "slow machine",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=W2.prompts,
        help="of W2; the peers were measured with 32, which takes longer",
    )
    asked = parser.parse_args()
    if asked.prompts < WARM_UP:
        parser.error(f"--prompts {asked.prompts}: must be at least {WARM_UP}")
    if not (asked.model / "config.json").exists():
        sys.exit(f"{asked.model}: no such model folder (ppo-dist fetch smollm2-135m {asked.model})")
    import torch

    from tests.bench.machine import faster, gemm

    torch.set_num_threads(asked.threads)
    dtype = asked.dtype or faster("fp32", "bf16")
    how = f"{asked.threads} threads, {dtype}{', learner.compile' if asked.compile else ''}"
    print(how, flush=True)
    bench = Bench(asked.model.resolve(), asked.out.resolve(), asked.threads, dtype, asked.compile)
    # of several, since others may be at work at this moment
    seconds, rate = 0.4 * 60 * asked.minutes, max(gemm(dtype) for _ in range(5))
    works = (W1, replace(W2, prompts=asked.prompts))
    w1, w2 = (replace(work, dtype=dtype).within(seconds, rate) for work in works)
    w4 = replace(W4, dtype=dtype)
    ways: dict[str, Callable[[], str]] = {
        "W1": lambda: bench.iterations(w1),
        "W2": lambda: bench.iterations(w2),
        "W3": lambda: bench.small(W3),
        "W4": lambda: bench.supervised(w4),
        "W5": bench.scaling,
    }
    unknown = set(asked.works) - ways.keys()
    if unknown:
        sys.exit(f"{min(unknown)} is not one of {', '.join(ways)}")
    parts = [how, *(ways[name]() for name in asked.works or ways)]
    (bench.folder / "bench.md").write_text("\n\n".join(parts) + "\n")
    machine = {
        "threads": asked.threads,
        "dtype": dtype,
        "compile": asked.compile,
        "system": platform.platform(),
    }
    (bench.folder / "bench.json").write_text(json.dumps({**machine, **bench.found}, indent=2))
    print("\n\n".join(parts))


if __name__ == "__main__":
    main()
