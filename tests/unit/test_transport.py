"""Buckets of weights, and what happens to spoiled ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ppo_dist.protocols import WeightsError
from ppo_dist.transport.collective import CollectiveReceiver, CollectiveSender
from ppo_dist.transport.disk import DiskReceiver, DiskSender
from ppo_dist.transport.wire import buckets, of_all
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


def test_versions_that_nobody_asked_for_do_not_stay() -> None:
    sender = CollectiveSender("cpu", 2**20, deadline_s=10.0)
    receiver = CollectiveReceiver("cpu", "127.0.0.1", sender.port, 10.0)
    for version in (1, 2, 3):
        sent = sender.publish(version, weights().items())
        receiver.receive(sent, 10.0)
    assert set(receiver._versions) == {1, 2, 3}
    assert {name for name, _ in receiver.fetch(sent)} == set(weights())
    assert receiver._versions == {}
