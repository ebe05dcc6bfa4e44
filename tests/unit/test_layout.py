"""Who gets which resources, on paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from ppo_dist.cluster.layout import Layout, Node, Slot, difference, layout, scattered
from ppo_dist.config import Config, InputError
from tests.conftest import raw_config

VLLM = {"kind": "vllm", "tensor_parallel": 2}


def config(folder: Path, learners: int, rollouts: int, **sections: Any) -> Config:
    sections["rollout"] = {"workers": rollouts, "cpus": 3, **sections.get("rollout", {})}
    sections["cluster"] = {"kind": "ray", "device": "auto", **sections.get("cluster", {})}
    return Config.model_validate(
        raw_config(folder, learner={"workers": learners, "cpus": 2}, **sections)
    )


def test_without_gpus_workers_get_cpus(tmp_path: Path) -> None:
    made = layout(config(tmp_path, 2, 1), [Node(4, 0), Node(3, 0)])
    assert made == Layout(
        bundles=({"CPU": 2}, {"CPU": 2}, {"CPU": 3}),
        learners=(Slot(0, 2, 0), Slot(1, 2, 0)),
        rollouts=(Slot(2, 3, 0),),
        judges=(),
        device="cpu",
    )


def test_split_workers_have_gpus_of_their_own(tmp_path: Path) -> None:
    made = layout(config(tmp_path, 2, 2, rollout={"engine": VLLM}), [Node(8, 4), Node(8, 2)])
    assert made.device == "cuda"
    assert made.bundles == (
        {"CPU": 2, "GPU": 1},
        {"CPU": 2, "GPU": 1},
        {"CPU": 3, "GPU": 2},  # one bundle is on one node, so a tensor-parallel worker is too
        {"CPU": 3, "GPU": 2},
    )
    assert [slot.gpus for slot in made.learners] == [1, 1]
    assert made.rollouts == (Slot(2, 3, 2), Slot(3, 3, 2))


def test_colocated_workers_borrow_the_gpus_of_the_learners(tmp_path: Path) -> None:
    where = {"placement": "colocated"}
    wanted = config(tmp_path, 4, 2, rollout={"engine": VLLM}, cluster=where)
    made = layout(wanted, [Node(7, 2), Node(7, 2)])
    assert made.bundles == ({"CPU": 7, "GPU": 2},) * 2
    assert made.learners == (Slot(0, 2, 1), Slot(0, 2, 1), Slot(1, 2, 1), Slot(1, 2, 1))
    assert made.rollouts == (Slot(0, 3, 0), Slot(1, 3, 0))


def test_learners_or_rollout_workers_alone(tmp_path: Path) -> None:
    wanted = config(tmp_path, 2, 1)
    alone = layout(wanted, [Node(4, 2)], has_rollouts=False)
    assert (len(alone.bundles), len(alone.learners), alone.rollouts) == (2, 2, ())
    alone = layout(wanted, [Node(4, 1)], has_learners=False)
    assert alone.bundles == ({"CPU": 3, "GPU": 1},) and alone.rollouts == (Slot(0, 3, 1),)


def test_the_device_can_be_said(tmp_path: Path) -> None:
    made = layout(config(tmp_path, 1, 1, cluster={"device": "cpu"}), [Node(8, 8)])
    assert made.device == "cpu" and all("GPU" not in bundle for bundle in made.bundles)


def test_a_small_cluster_is_told_what_lacks(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="7 CPUs asked for, 6 found, 3 GPUs asked for, 2 found"):
        layout(config(tmp_path, 2, 1), [Node(3, 1), Node(3, 1)])
    wide = config(tmp_path, 1, 1, rollout={"engine": {"kind": "vllm", "tensor_parallel": 4}})
    nodes = [Node(8, 2), Node(8, 3)]
    with pytest.raises(InputError, match=r"no node has 3 CPUs and 4 GPUs .* 8 CPUs and 3 GPUs"):
        layout(wide, nodes)


def test_a_cluster_that_is_joined_may_still_grow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ppo_dist.cluster import session

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    looked: list[int] = []

    def nodes() -> list[Node]:
        looked.append(1)
        return [Node(2.0 * len(looked), 0.0)]

    monkeypatch.setattr(session, "nodes", nodes)
    there: dict[str, Any] = {"address": "10.0.0.5:6379"}
    session.fitting(config(tmp_path, 1, 1, cluster=there))
    assert len(looked) == 3
    for cluster, times in ((there | {"wait_s": 0}, 2), ({}, 1)):
        looked.clear()
        with pytest.raises(InputError, match="too small"):
            session.fitting(config(tmp_path, 1, 9, cluster=cluster))
        assert len(looked) <= times


def test_room_that_is_scattered_in_words() -> None:
    """Two GPUs are free where two are asked for, and yet no node has both."""
    asked = [{"CPU": 3.0, "GPU": 2.0}]
    assert scattered(asked, [Node(4.0, 1.0), Node(2.0, 1.0)]) == (
        "1 more bundles asked for, the largest of 3 CPUs and 2 GPUs on one node; found free on the "
        "nodes with the most room: 4 CPUs and 1 GPUs; 2 CPUs and 1 GPUs"
    )
    assert scattered(asked, [Node(1.0, 0.0)] * 500).count(";") == 8, "not of hundreds of nodes"


def test_a_difference_in_words() -> None:
    assert difference([{"CPU": 2.0, "GPU": 1.0}], {"CPU": 2.0, "GPU": 1.0}) == ""
    assert difference([{"CPU": 2.0}] * 2, {"CPU": 3.0}) == "4 CPUs asked for, 3 found"


@pytest.mark.parametrize(
    ("sections", "told"),
    [
        ({"learner": {"workers": 2}}, "must be 1"),
        ({"transport": {"kind": "collective"}}, "store or disk"),
        ({"stream": {"max_lag": 1}}, "max_lag to 0"),
        ({"cluster": {"kind": "local", "placement": "colocated"}}, "cluster.kind to ray"),
    ],
)
def test_what_cannot_be_colocated(tmp_path: Path, sections: dict[str, Any], told: str) -> None:
    raw = {"cluster": {"kind": "ray", "placement": "colocated"}, **sections}
    with pytest.raises(ValueError, match=told):
        Config.model_validate(raw_config(tmp_path, **raw))
