"""Weights by collective broadcast (gloo on CPUs, nccl on GPUs), bucket by bucket.

The sender calls before every version, through a store of keys that it serves, and broadcasts to the
receivers that answer in time. So one that is dead or late is lost and hangs nobody; where it finds
that out it takes a new ID, and is taken in with the next version. A receiver has a thread for this:
it takes part while its worker generates, and keeps what came on the CPU until it is asked for.

Keys, with n the number of the call:   call/n  version        here/n/ID  set by each receiver
    members/n  group and IDs of who takes part                 bucket/n/i  parts and digest, or END
    left/ID    set by a receiver that has another ID from now on
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import timedelta
from typing import Any

import torch
from torch._C._distributed_c10d import PrefixStore, TCPStore

from ppo_dist import device
from ppo_dist.protocols import NamedTensors, WeightsError
from ppo_dist.transport.wire import Bucket, Part, digest, flattened, of_all
from ppo_dist.types import Weights

END = "end"
BROKEN = "broken"
FOREVER = timedelta(days=365)
POLL_S = 0.002
PHASES = 3  # in which a sender may wait for a receiver: its answer, a new group, a broadcast


class CollectiveSender:
    """Sends from one process; Weights.parts are empty. For receivers that are late or dead it waits
    at most `deadline_s` in all. One that is alive and slow slows all: each bucket has a third.
    """

    def __init__(self, kind: device.DeviceKind, bucket_bytes: int, deadline_s: float) -> None:
        self._kind, self._bucket_bytes, self._wait_s = kind, bucket_bytes, deadline_s / PHASES
        self._store = TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)
        self.port: int = self._store.port
        self._call = 0
        self._lost: set[int] = set()
        self._said: dict[int, list[str]] = {}  # by call: the keys that nobody needs once it is over
        self._members: list[int] = []
        self._name = ""
        self._group: Any = None

    def publish(self, version: int, weights: NamedTensors) -> Weights:
        """See WeightSender. All weights are taken from the iterator, whatever happens to receivers:
        other ranks lend their shards for each.
        """
        self._call += 1
        self._forget(self._call - 2)
        self._store.set(f"call/{self._call}", str(version))
        self._store.add("calls", 1)
        self._assemble()
        digests: list[str] = []
        for parts, flat in flattened(weights, self._bucket_bytes):
            digests.append(digest(flat.cpu().numpy()))
            self._send(len(digests) - 1, parts, digests[-1], flat)
        self._say(f"bucket/{self._call}/{len(digests)}", END)
        return Weights(version, (), of_all(digests), again=False)

    def _assemble(self) -> None:
        """Who answers the call takes part; the group is kept as long as it is the same."""
        present = self._answering()
        if self._group is None or present != self._members:
            self._group, self._members, self._name = None, present, f"group/{self._call}"
        said = {"group": self._name, "members": present}
        self._say(f"members/{self._call}", json.dumps(said))
        if self._group is None and present:
            store = PrefixStore(self._name, self._store)
            try:
                self._group = device.process_group(
                    self._kind, store, 0, len(present) + 1, self._wait_s
                )
            except RuntimeError:
                self._say(f"bucket/{self._call}/0", BROKEN)  # the next version has a new group

    def _answering(self) -> list[int]:
        """The receivers that answer in time; the others are not waited for again."""
        end = time.monotonic() + self._wait_s
        asked = set(range(1, self._store.add("receivers", 0) + 1)) - self._lost
        self._lost |= {receiver for receiver in asked if self._store.check([f"left/{receiver}"])}
        asked -= self._lost
        keys = {receiver: f"here/{self._call}/{receiver}" for receiver in asked}
        self._said.setdefault(self._call, []).extend(keys.values())
        missing = set(asked)
        while True:
            missing -= {receiver for receiver in missing if self._store.check([keys[receiver]])}
            if not missing or time.monotonic() > end:
                break
            time.sleep(POLL_S)
        self._lost |= missing
        return sorted(asked - missing)

    def _send(self, number: int, parts: tuple[Part, ...], found: str, flat: torch.Tensor) -> None:
        if self._group is None:
            return
        about = {"parts": [asdict(p) for p in parts], "digest": found, "bytes": len(flat)}
        self._say(f"bucket/{self._call}/{number}", json.dumps(about))
        try:
            self._group.broadcast(flat.to(device.of_collectives(self._kind)), 0).wait()
        except RuntimeError:
            self._group = None  # nobody gets the rest; the next version has a new group
            self._say(f"bucket/{self._call}/{number + 1}", BROKEN)

    def _say(self, key: str, value: str) -> None:
        self._store.set(key, value)
        self._said.setdefault(self._call, []).append(key)

    def _forget(self, call: int) -> None:
        """A run has very many calls."""
        for key in self._said.pop(call, []):
            self._store.delete_key(key)


class CollectiveReceiver:
    """Receives in a thread of its own: answers every call from the one under way on, and keeps the
    newest `keep` versions. `deadline_s` is that of the sender.

    Raises:
        WeightsError: the sender cannot be reached.
    """

    def __init__(
        self, kind: device.DeviceKind, address: str, port: int, deadline_s: float, keep: int
    ) -> None:
        self._kind, self._deadline_s, self._keep = kind, deadline_s, keep
        self._arrived = threading.Condition()
        self._versions: dict[int, list[Bucket]] = {}
        self._failed: dict[int, str] = {}  # versions that came with other bytes, or will not come
        self._problem: str | None = None
        self._id: int | None = None
        self._has_ended = False
        try:
            self._store = TCPStore(address, port, timeout=timedelta(seconds=deadline_s))
        except RuntimeError as error:
            raise WeightsError(f"{address}:{port}: {error}") from None
        self._register()
        self._thread = threading.Thread(target=self._listen, daemon=True, name="weights")
        self._thread.start()

    def receive(self, weights: Weights, deadline_s: float) -> None:
        """See WeightReceiver.

        Raises:
            ConnectionError: nothing will arrive any more, here; a new process may connect.
        """
        version = weights.version

        def is_settled() -> bool:
            return version in self._versions or version in self._failed or self._has_ended

        with self._arrived:
            self._arrived.wait_for(is_settled, deadline_s)
            if version in self._versions:
                return
            if self._has_ended:
                raise ConnectionError(f"the learners cannot be reached any more: {self._problem}")
            if version in self._failed:
                raise WeightsError(f"version {version}: {self._failed[version]}")
            raise WeightsError(
                f"version {version} did not arrive in {deadline_s:g} s"
                + (f": {self._problem}" if self._problem else "")
            )

    def fetch(self, weights: Weights) -> Iterator[tuple[str, torch.Tensor]]:
        """See WeightReceiver."""
        with self._arrived:
            found = self._versions.get(weights.version)
            for old in [v for v in self._versions if v <= weights.version]:
                del self._versions[old]  # what was skipped will not be asked for any more
        if found is None:
            raise WeightsError(f"version {weights.version} is not here")
        if of_all(bucket.digest for bucket in found) != weights.digest:
            raise WeightsError(f"version {weights.version} is not whole")
        for bucket in found:
            yield from bucket.tensors()

    def _register(self) -> None:
        """Under a new ID: the group of before may be in any state."""
        if self._id is not None:
            self._store.set(f"left/{self._id}", "")
        self._id = self._store.add("receivers", 1)
        self._group: Any = None
        self._name: str | None = None

    def _listen(self) -> None:
        try:
            self._answer()
        finally:
            with self._arrived:
                self._has_ended = True
                self._arrived.notify_all()

    def _answer(self) -> None:
        """Takes part in every version from the call under way on."""
        call = max(self._store.add("calls", 0), 1)
        while True:
            version = None
            try:
                self._store.set_timeout(FOREVER)
                version = int(self._store.get(f"call/{call}"))
                # the sender itself may wait that long, for another receiver
                self._store.set_timeout(timedelta(seconds=2 * self._deadline_s))
                if self._store.add("calls", 0) > call:  # it is over
                    self._register()
                else:
                    self._take_part(call, version)
            except RuntimeError as error:
                self._problem = str(error).splitlines()[0]
                if not self._registers_again():
                    return
                if version is not None:
                    self._settle(version, [], f"it did not arrive: {self._problem}")
            call += 1

    def _registers_again(self) -> bool:
        """Whether the sender is still there to know."""
        try:
            self._register()
        except RuntimeError:
            return False
        return True

    def _take_part(self, call: int, version: int) -> None:
        """Receives the version, or tells whoever waits for it that it will not come.

        Raises:
            RuntimeError: the sender or the group failed.
        """
        with self._arrived:  # before the sender can know that this receiver is there
            self._failed.pop(version, None)
        if not self._joins(call):
            self._register()
            self._settle(version, [], "it did not arrive: this worker answered too late")
            return
        found: list[Bucket] = []
        problem = None
        for bucket in self._buckets(call):
            found.append(bucket)
            problem = problem or _changed(bucket)  # while the next one is made
        self._settle(version, found, problem)  # a changed one is its own affair: the group stays

    def _joins(self, call: int) -> bool:
        """Whether it is in time to be one of those who take part, and then of their group."""
        self._store.set(f"here/{call}/{self._id}", "")
        chosen = json.loads(self._store.get(f"members/{call}"))
        if self._id not in chosen["members"]:
            return False
        if chosen["group"] != self._name:
            self._group = device.process_group(
                self._kind,
                PrefixStore(chosen["group"], self._store),
                1 + chosen["members"].index(self._id),
                len(chosen["members"]) + 1,
                self._deadline_s / PHASES,
            )
            self._name = chosen["group"]
        return True

    def _settle(self, version: int, found: list[Bucket], problem: str | None) -> None:
        with self._arrived:
            if problem is None:
                self._versions[version], self._problem = found, None
            else:
                self._failed[version] = problem
            for kept in (self._versions, self._failed):
                for old in sorted(kept)[: -self._keep]:
                    del kept[old]
            self._arrived.notify_all()

    def _buckets(self, call: int) -> Iterator[Bucket]:
        number = 0
        while (said := self._store.get(f"bucket/{call}/{number}").decode()) != END:
            if said == BROKEN:
                raise RuntimeError("another receiver failed, so the sending was broken off")
            about = json.loads(said)
            flat = device.empty_bytes(about["bytes"], device.of_collectives(self._kind))
            self._group.broadcast(flat, 0).wait()
            parts = tuple(Part(**{**p, "shape": tuple(p["shape"])}) for p in about["parts"])
            yield Bucket(parts, flat.cpu().numpy(), about["digest"])
            number += 1


def _changed(bucket: Bucket) -> str | None:
    """Which bytes are not those that were sent, in words; None: none."""
    try:
        bucket.check()
    except WeightsError as error:
        return str(error)
    return None
