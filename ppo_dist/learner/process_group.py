"""What all learners communicate in."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import os

import deepspeed
import deepspeed.ops
import torch
from torch.distributed import distributed_c10d as c10d

from ppo_dist.device import DeviceKind, backend, environment


def join_group(
    rank: int, world: int, address: str, port: int, kind: DeviceKind, deadline_s: float
) -> None:
    """Joins the process group of all learners; a second call in the same process does nothing. A
    rank waits at most `deadline_s` for the others.
    """
    if torch.distributed.is_initialized():
        return
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(world),
        LOCAL_RANK="0",
        MASTER_ADDR=address,
        MASTER_PORT=str(port),
    )
    # ZeRO imports DeepSpeed's Muon, which nothing here uses and which is compiled where it is
    # defined: torch's compiler alone takes 2 s to import
    with environment(TORCHDYNAMO_DISABLE="1"), contextlib.suppress(ImportError):
        importlib.import_module("deepspeed.runtime.zero.muon.original_muon")
    # DeepSpeed compiles a shared-memory op at this point unless it is marked as not available
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    timeout = datetime.timedelta(seconds=deadline_s)
    deepspeed.init_distributed(dist_backend=backend(kind), timeout=timeout, verbose=False)


def limit_waits(deadline_s: float) -> None:
    """Gives all groups the same deadline: DeepSpeed makes some with torch's own, of 10 or 30
    minutes, which is too short for those who have asked for more.
    """
    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(datetime.timedelta(seconds=deadline_s), group)
