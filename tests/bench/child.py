"""One measurement in a process of its own: python -m tests.bench.child WORK.json OUT.json."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from tests.bench.work import Found, Work


def measured(kind: str, job: dict[str, Any]) -> Found:
    """What one contender finds; and how fast the machine was before and after, since one that is
    shared with others is not always as fast.
    """
    if kind == "scaling":
        from tests.bench import scaling

        return scaling.run()
    import torch

    from tests.bench.machine import gemm

    torch.set_num_threads(job["threads"])
    before = gemm(job["dtype"])
    found = alone(kind, job)
    return replace(found, machine=(before, gemm(job["dtype"])))


def alone(kind: str, job: dict[str, Any]) -> Found:
    """What one contender finds."""
    if kind in ("plain", "trl"):
        peer = importlib.import_module(f"tests.bench.{kind}")
        files = (Path(job[name]) for name in ("model", "reward", "prompts"))
        found: Found = peer.run(Work(**job["work"]), *files)
        return found
    from tests.bench import own

    if kind == "own":
        return own.run(job["config"], Path(job["keep"]))
    return own.learner(job["config"], Path(job["keep"]), job["times"])


if __name__ == "__main__":
    job = json.loads(Path(sys.argv[1]).read_text())
    Path(sys.argv[2]).write_text(json.dumps(asdict(measured(job["kind"], job))))
