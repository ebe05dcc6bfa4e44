"""What a process that lives long keeps."""

from __future__ import annotations

import ctypes
import gc
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from ppo_dist.cluster.driver import long_lived

PIECES, SIZE = 400, 1 << 18  # 100 MB, as the rows of a step are


def faults_of_a_step() -> int:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [bytearray(b"x") * SIZE for _ in range(PIECES)]
    del kept
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def test_what_libraries_have_made_is_not_looked_at() -> None:
    made = [[n] for n in range(1000)]
    with long_lived():
        assert gc.get_freeze_count() > len(made)
        young = [[n] for n in range(1000)]
        assert not any(found is made[0] for found in gc.get_objects())
        assert any(found is young[0] for found in gc.get_objects())
    assert gc.get_freeze_count() == 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="malloc is not glibc's")
def test_what_a_step_frees_is_there_for_the_next_one() -> None:
    code = "import tests.unit.test_driver as own; own.tell()"
    command, root = [sys.executable, "-c", code], Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True)
    without, within = map(int, done.stdout.split())
    assert within < without / 20


def tell() -> None:
    """Page faults of a third step, without and within."""
    without = [faults_of_a_step() for _ in range(3)][-1]
    with long_lived():
        within = [faults_of_a_step() for _ in range(3)][-1]
    print(without, within)
