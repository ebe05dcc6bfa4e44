"""Processes that end with the one that owns them."""

from __future__ import annotations

import subprocess
import sys

import psutil

CHILD = "from ppo_dist.rollout import orphans; orphans.end_with_owner(); print('up', flush=True)"
STAYS = "import time; time.sleep(600)"
OWNER = f"""
import subprocess, sys
from ppo_dist.rollout import orphans
orphans.own_processes()
orphans.end_with_owner()
child = subprocess.Popen([sys.executable, "-c", "{CHILD}; {STAYS}"], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
{STAYS}
"""


def test_a_process_ends_with_its_owner_that_was_killed() -> None:
    with subprocess.Popen([sys.executable, "-c", OWNER], stdout=subprocess.PIPE, text=True) as own:
        assert own.stdout is not None
        child = psutil.Process(int(own.stdout.readline()))
        assert child.is_running() and own.poll() is None
        own.kill()
        assert child.wait(10) is None, "nobody's child: how it ended is not told"
