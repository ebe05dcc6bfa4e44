"""What the process that drives a cluster does not look at again."""

from __future__ import annotations

import gc

from ppo_dist.cluster.driver import long_lived


def test_what_libraries_have_made_is_not_looked_at() -> None:
    made = [[n] for n in range(1000)]
    with long_lived():
        assert gc.get_freeze_count() > len(made)
        young = [[n] for n in range(1000)]
        assert not any(found is made[0] for found in gc.get_objects())
        assert any(found is young[0] for found in gc.get_objects())
    assert gc.get_freeze_count() == 0
