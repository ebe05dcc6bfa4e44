"""This node in the network."""

from __future__ import annotations

import os
from typing import Any

import psutil
import ray

from ppo_dist import device


def address() -> str:
    """This node's, as the others of the cluster know it."""
    found: str = ray.util.get_node_ip_address()
    return found


def round_trip(*arguments: Any) -> float:
    """See device.round_trip; at the interface that a run uses."""
    use_own_interface()
    return device.round_trip(*arguments)


def use_own_interface() -> None:
    """Has gloo listen at the interface of `address`, unless GLOO_SOCKET_IFNAME names another.

    By itself it listens where the machine's name leads, which on many is the loopback: other nodes
    are then told an address that is their own.
    """
    for name, found in psutil.net_if_addrs().items():
        if any(each.address == address() for each in found):
            os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
