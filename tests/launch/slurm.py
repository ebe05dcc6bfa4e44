"""A Slurm of a controller and nodes on this machine, in a folder and on ports of its own."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from tests.launch.rig import ROOT, environment, free_ports, running, wait_for

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")
CONFIG = """\
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={port}
SlurmUser=root
AuthType=auth/munge
CredType=cred/munge
# a requeued job waits until its credential has expired
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
MpiDefault=none
ReturnToService=2
MinJobAge=3600
SchedulerParameters=batch_sched_delay=1,sched_interval=2,bf_interval=2
{nodes}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=all Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=first Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=9 PreemptMode=OFF
"""


def missing() -> str:
    """Why there can be no Slurm here; empty if there can."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"needs slurm-wlm and munge of Debian: no {', '.join(absent)}"
    return "" if os.geteuid() == 0 else "its daemons need root"


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin")


@dataclass(frozen=True)
class Slurm:
    """A running cluster.

    Example: Slurm(env={"SLURM_CONF": "/tmp/slurm-x/slurm.conf", …})
    """

    env: dict[str, str]

    def command(self, *words: str | Path, cwd: Path | None = None) -> str:
        result = subprocess.run(
            [str(word) for word in words], env=self.env, cwd=cwd, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stderr
        return result.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What the controller says of it, or of its first component, such as {"JobState":
        "RUNNING", "Restarts": "1"}.
        """
        line, *_ = self.command("scontrol", "--oneliner", "show", "job", number).splitlines()
        return dict(word.split("=", 1) for word in line.split() if "=" in word)


@contextlib.contextmanager
def slurm(folder: Path, cpus: Sequence[int]) -> Iterator[Slurm]:
    """A cluster of nodes n1, n2, … that say that they have so many CPUs. The folder's parents must
    be open to all, or munged does not start.
    """
    key = folder / "munge.key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o600)
    folder.chmod(0o755)
    (folder / "state").mkdir()
    port, *ports = free_ports(1 + len(cpus))
    names = [f"n{number + 1}" for number in range(len(cpus))]
    nodes = [
        f"NodeName={name} NodeHostname=localhost NodeAddr=127.0.0.1 Port={own} CPUs={count}"
        for name, own, count in zip(names, ports, cpus, strict=True)
    ]
    config = folder / "slurm.conf"  # an absolute path, or the controller waits for itself
    config.write_text(CONFIG.format(folder=folder, port=port, nodes="\n".join(nodes)))
    env = environment(folder / "home")
    env |= {"SLURM_CONF": str(config), "PPO_DIST_ROOT": str(ROOT)}
    munge = [f"--{what}-file={folder}/munge.{what}" for what in ("key", "pid", "log", "seed")]
    commands = [["munged", "--foreground", f"--socket={folder}/munge.socket", *munge]]
    commands += [["slurmctld", "-D", "-f", str(config)]]
    commands += [["slurmd", "-D", "-f", str(config), "-N", name] for name in names]
    made = Slurm(env)
    with contextlib.ExitStack() as stack:
        for name, *rest in commands:
            found = _program(name)
            assert found
            stack.enter_context(running([found, *rest], folder / f"{name}.out", env))
            if name == "munged":
                wait_for((folder / "munge.socket").exists, 20)
        wait_for(lambda: _idle(made) == len(cpus), 60, (folder / "slurmctld.log").read_text)
        yield made
        subprocess.run(["scancel", "--user=root"], env=env)
        wait_for(lambda: not made.command("squeue", "--noheader"), 60)


def _idle(made: Slurm) -> int:
    result = subprocess.run(
        ["sinfo", "-h", "-N", "-p", "all", "-o", "%T"], env=made.env, capture_output=True, text=True
    )
    return result.stdout.split().count("idle")
