"""What of the device can be seen without one."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys, torch
from ppo_dist import device
if sys.argv[1] == "prepared":
    device.prepare("cpu", 1)
def fill():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
fill()
print(fill())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="about glibc's malloc")
def test_what_is_freed_on_a_cpu_is_used_again() -> None:
    """64 MB are 16,384 pages, each a fault when the system has to clear it anew."""
    faults = {}
    for how in ("prepared", "plain"):
        command = [sys.executable, "-c", PROGRAM, how]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        faults[how] = int(done.stdout)
    assert faults["prepared"] < faults["plain"] / 10, faults
