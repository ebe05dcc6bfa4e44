"""Places for workers in a cluster that others use too."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from ray.util.placement_group import placement_group, remove_placement_group

from ppo_dist.cluster.layout import layout
from ppo_dist.cluster.session import nodes, reserved
from ppo_dist.config import Config, InputError
from tests.conftest import raw_config


def test_a_busy_cluster_is_waited_for_and_then_said_to_be(
    ray_session: None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("ppo_dist.cluster.session.TOLD_AFTER_S", 1.0)
    two = {"workers": 2}
    raw = raw_config(tmp_path, cluster={"kind": "ray", "wait_s": 3}, learner=two, rollout=two)
    config = Config.model_validate(raw)
    wanted = layout(config, nodes())
    others = placement_group([{"CPU": 6}])
    assert others.wait(30)
    begin = time.monotonic()
    lacks = r"after 3 s \(cluster\.wait_s\): 4 CPUs asked for, 2 found"
    with pytest.raises(InputError, match=lacks), reserved(config, wanted):
        pass
    assert 2 <= time.monotonic() - begin < 20, "Ray waits for whole seconds"
    waits = "more for room in the cluster: 4 CPUs asked for, 2 found"
    assert waits in caplog.text, "told of before the wait is over"
    remove_placement_group(others)
    patient = raw_config(tmp_path, cluster={"kind": "ray"}, learner=two, rollout=two)
    with reserved(Config.model_validate(patient), wanted) as (learners, rollouts, _):
        assert len(learners.slots) == len(rollouts.slots) == 2
