"""Buckets of weights, and what happens to spoiled ones."""

from __future__ import annotations

import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppo_dist.protocols import WeightsError
from ppo_dist.transport import collective
from ppo_dist.transport.collective import CollectiveReceiver, CollectiveSender
from ppo_dist.transport.disk import DiskReceiver, DiskSender
from ppo_dist.transport.wire import Bucket, buckets, of_all
from ppo_dist.types import Weights
from tests.contract.suites import weights


@pytest.mark.parametrize("limit", [1, 40, 2**20])
def test_buckets_hold_every_tensor_once_and_about_as_much_as_they_may(limit: int) -> None:
    made = list(buckets(weights().items(), limit))
    found = {name: tensor for bucket in made for name, tensor in bucket.tensors()}
    assert list(found) == list(weights())
    for name, tensor in weights().items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
    assert all(len(bucket.raw) <= limit or len(bucket.parts) == 1 for bucket in made)
    assert len(made) == {1: 4, 40: 2, 2**20: 1}[limit]


def test_a_changed_byte_is_noticed() -> None:
    (bucket,) = buckets(weights().items(), 2**20)
    bucket.check()
    for at in (0, len(bucket.raw) // 2, len(bucket.raw) - 1):
        spoiled = bucket.raw.copy()
        spoiled[at] ^= 1
        with pytest.raises(WeightsError, match=r"a\.weight and what follows"):
            replace(bucket, raw=spoiled).check()


def test_a_digest_is_of_the_bytes_and_of_their_order() -> None:
    one, two = buckets(weights().items(), 2**20), buckets(weights().items(), 2**20)
    assert [b.digest for b in one] == [b.digest for b in two]
    assert of_all(["a", "b"]) != of_all(["b", "a"])


@pytest.mark.parametrize("damage", ["changed", "cut", "gone"])
def test_a_damaged_file_is_named(tmp_path: Path, damage: str) -> None:
    sent = DiskSender(tmp_path, 2**20, keep=1).publish(3, weights().items())
    (file,) = (tmp_path / "version-00000003").iterdir()
    content = bytearray(file.read_bytes())
    if damage == "gone":
        file.unlink()
    else:
        content[-1] ^= 1
        file.write_bytes(content if damage == "changed" else content[:-1])
    with pytest.raises(WeightsError, match=file.name):
        DiskReceiver().receive(sent, 1.0)
    with pytest.raises(WeightsError, match=file.name):
        list(DiskReceiver().fetch(sent))


def test_a_folder_that_does_not_come_is_waited_for_no_longer_than_the_deadline(
    tmp_path: Path,
) -> None:
    sent = DiskSender(tmp_path, 2**20, keep=1).publish(3, weights().items())
    elsewhere = replace(sent, parts=(str(tmp_path / "not-there"), *sent.parts[1:]))
    with pytest.raises(WeightsError, match=r"not to be seen here after 0\.2 s"):
        DiskReceiver().receive(elsewhere, 0.2)


def test_a_resumed_run_does_not_remove_its_own_versions(tmp_path: Path) -> None:
    DiskSender(tmp_path, 2**20, keep=1).publish(30, weights().items())
    sent = DiskSender(tmp_path, 2**20, keep=1).publish(10, weights().items())
    DiskReceiver().receive(sent, 1.0)
    assert [folder.name for folder in tmp_path.iterdir()] == ["version-00000010"]


class Far:
    """A sender and its receivers in this process; all that is asked for is looked at."""

    def __init__(self, receivers: int, deadline_s: float = 3.0) -> None:
        self.sender = CollectiveSender("cpu", 40, deadline_s)
        self.deadline_s = deadline_s
        self.receivers = [
            CollectiveReceiver("cpu", "127.0.0.1", self.sender.port, deadline_s, keep=3)
            for _ in range(receivers)
        ]

    def publish(self, version: int) -> Weights:
        return self.sender.publish(version, weights().items())

    def check(self, receiver: CollectiveReceiver, sent: Weights) -> None:
        receiver.receive(sent, self.deadline_s)
        got = dict(receiver.fetch(sent))
        assert all(torch.equal(got[name], tensor) for name, tensor in weights().items())


def test_versions_that_nobody_asked_for_do_not_stay() -> None:
    far = Far(1)
    (receiver,) = far.receivers
    for version in range(1, 6):
        receiver.receive(sent := far.publish(version), 3.0)
    assert set(receiver._versions) == {3, 4, 5}, "the newest three"
    far.check(receiver, sent)
    assert receiver._versions == {}


def test_a_receiver_whose_bytes_were_changed_gets_them_the_next_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    far = Far(2)
    one, other = far.receivers
    spoiled, changed = one._id, collective._changed

    def check(bucket: Bucket) -> str | None:
        is_one = threading.current_thread() is one._thread
        return "bytes were changed" if is_one else changed(bucket)

    with monkeypatch.context() as patched:
        patched.setattr(collective, "_changed", check)
        sent = far.publish(1)
        far.check(other, sent)
        with pytest.raises(WeightsError, match="version 1: bytes were changed"):
            one.receive(sent, 3.0)
    begin = time.monotonic()
    sent = far.publish(1)
    far.check(one, sent)
    assert time.monotonic() - begin < 1.0 and one._id == spoiled, "in the group of before"
    sent = far.publish(2)
    for receiver in far.receivers:
        far.check(receiver, sent)


def test_a_late_receiver_misses_what_it_is_late_for_and_nothing_more(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    far = Far(2)
    one, other = far.receivers
    far.check(one, far.publish(1))
    take_part, late = one._take_part, threading.Event()

    def after_a_while(call: int, version: int) -> None:
        late.wait(20)
        take_part(call, version)

    monkeypatch.setattr(one, "_take_part", after_a_while)
    begin = time.monotonic()
    sent = far.publish(2)
    assert time.monotonic() - begin < far.deadline_s
    far.check(other, sent)
    late.set()
    with pytest.raises(WeightsError, match="did not arrive: this worker answered too late"):
        one.receive(sent, 60.0)
    for version in (3, 4):
        begin = time.monotonic()
        sent = far.publish(version)
        for receiver in far.receivers:
            far.check(receiver, sent)
        assert time.monotonic() - begin < 1.0, "nobody waited for its old ID"


def test_a_receiver_that_nothing_can_reach_any_more_is_lost(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A new process may connect; who merely says that a version did not arrive is kept."""
    far = Far(2)
    one, other = far.receivers

    def gone(*_: object) -> None:
        raise RuntimeError("Connection reset by peer")

    monkeypatch.setattr(one, "_take_part", gone)
    monkeypatch.setattr(one, "_register", gone)
    sent = far.publish(1)
    far.check(other, sent)
    with pytest.raises(ConnectionError, match="cannot be reached any more: Connection reset"):
        one.receive(sent, 60.0)


class Broken:
    """A process group after an error of its own."""

    def broadcast(self, *_: object) -> None:
        raise RuntimeError("no such peer")


def test_a_receiver_that_failed_joins_under_another_name() -> None:
    far = Far(2)
    sent = far.publish(1)
    for receiver in far.receivers:
        far.check(receiver, sent)
    far.receivers[0]._group = Broken()
    sent, begin = far.publish(2), time.monotonic()
    for receiver in far.receivers:
        with pytest.raises(WeightsError, match="version 2: it did not arrive: "):
            receiver.receive(sent, 60.0)
    assert time.monotonic() - begin < far.deadline_s, "nobody waits for what will not come"
    for version in (3, 4):
        sent = far.publish(version)
        for receiver in far.receivers:
            far.check(receiver, sent)


def test_keys_of_calls_that_are_over_do_not_stay() -> None:
    far = Far(1)
    (receiver,) = far.receivers
    seen = []
    for version in range(1, 8):
        far.check(receiver, far.publish(version))
        seen.append(far.sender._store.num_keys())
    assert seen[-1] - seen[2] <= len(seen) - 3, "one each: call/n"
