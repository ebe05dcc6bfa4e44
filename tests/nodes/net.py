"""Several machines in one, as far as the network goes: namespaces, each with a cable to a switch.
Nothing of it can be reached from outside, and nothing outside from it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SUBNET = "10.77.0"


@dataclass(frozen=True)
class Host:
    """A machine with a cable to the switch.

    Example: Host(space="ppo4711-c", address="10.77.0.3", switch="ppo4711-switch", port="c")
    """

    space: str
    address: str
    switch: str
    port: str

    def command(self, *arguments: str) -> list[str]:
        """What runs a program there."""
        return ["ip", "netns", "exec", self.space, *arguments]

    def cut(self) -> None:
        """Pulls the cable out of the switch."""
        ip("-n", self.switch, "link", "set", "dev", self.port, "down")

    def heal(self) -> None:
        """Puts it back."""
        ip("-n", self.switch, "link", "set", "dev", self.port, "up")

    def actors(self) -> Counter[str]:
        """How many Ray actors of each class run there, by the titles of their processes."""
        found: Counter[str] = Counter()
        for pid in _pids(self.space):
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{pid}/cmdline").read_text().split("\0")[0]
                if title.startswith("ray::") and "Actor" in title:
                    found[title.removeprefix("ray::").split(".")[0]] += 1
        return found

    def kill(self) -> None:
        """Ends all that runs there, as a power cut would."""
        _kill(self.space)


def ip(*arguments: str) -> str:
    """What the program `ip` says.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    return subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True).stdout


def why_not() -> str:
    """Why there can be no such network here; empty if there can."""
    try:
        with network(["probe"]):
            return ""
    except FileNotFoundError:
        return "the program `ip` (iproute2) is not installed"
    except subprocess.CalledProcessError as error:
        return f"{' '.join(error.cmd)}: {error.stderr.strip()}"


@contextlib.contextmanager
def network(names: Sequence[str]) -> Iterator[dict[str, Host]]:
    """Hosts by name, at one switch. At the end all that runs on them is ended."""
    _clear_away()
    prefix = f"ppo{os.getpid()}-"
    switch, hosts = f"{prefix}switch", {}
    with contextlib.ExitStack() as stack:
        _add(stack, switch)
        ip("-n", switch, "link", "add", "name", "switch", "type", "bridge")
        ip("-n", switch, "link", "set", "dev", "switch", "up")
        for number, name in enumerate(names, 1):
            host = Host(f"{prefix}{name}", f"{SUBNET}.{number}", switch, name)
            _add(stack, host.space)
            cable = ("link", "add", "name", name, "type", "veth", "peer", "name", "lan")
            ip("-n", switch, *cable, "netns", host.space)
            ip("-n", switch, "link", "set", "dev", name, "master", "switch", "up")
            ip("-n", host.space, "address", "add", f"{host.address}/24", "dev", "lan")
            for link in ("lo", "lan"):
                ip("-n", host.space, "link", "set", "dev", link, "up")
            hosts[name] = host
        yield hosts


def _add(stack: contextlib.ExitStack, space: str) -> None:
    ip("netns", "add", space)
    stack.callback(ip, "netns", "delete", space)  # with its end of each cable
    stack.callback(_kill, space)


def _clear_away() -> None:
    """Removes what a process has left that was ended before it could do so itself."""
    for line in ip("netns", "list").splitlines():
        space = line.split()[0]
        owner = re.match(r"ppo(\d+)-", space)
        if owner and not Path("/proc", owner[1]).exists():
            _kill(space)
            ip("netns", "delete", space)


def _pids(space: str) -> list[int]:
    return [int(pid) for pid in ip("netns", "pids", space).split()]


def _kill(space: str) -> None:
    while pids := _pids(space):
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)
