"""What a worker hands to its engine's process, which has it by no name of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from ppo_dist.rollout.handover import through_files

READ = """
import sys
import numpy as np
from ppo_dist.transport.wire import digest
print(digest(np.fromfile(sys.argv[1], np.uint8)))
"""


def test_another_process_reads_each_bucket_while_it_is_there() -> None:
    weights = [(f"w{i}", torch.randn(1000)) for i in range(3)]
    before, paths = set(os.listdir("/dev/shm")), list[str]()
    for told, expected in through_files(weights, 8000):
        command = [sys.executable, "-c", READ, told["path"]]
        assert subprocess.check_output(command, text=True).strip() == expected
        assert len(told["parts"]) * 4000 == os.path.getsize(told["path"])
        assert set(os.listdir("/dev/shm")) == before
        paths.append(told["path"])
    assert len(paths) == 2
    assert not any(map(os.path.exists, paths))
