"""The composition root: a config becomes parts. The only place that chooses by `kind`.

`check` reads and judges everything that can be wrong without loading a model; the others start the
rest.
"""

from ppo_dist.build.data import (
    Rows,
    absolute,
    check,
    check_model,
    initial_policy,
    located,
    model_folder,
)
from ppo_dist.build.parts import advantage_estimator, check_servers, gate, reward_source
from ppo_dist.build.workers import cluster, connected, learners, rollout_pool, workers

__all__ = [
    "Rows",
    "absolute",
    "advantage_estimator",
    "check",
    "check_model",
    "check_servers",
    "cluster",
    "connected",
    "gate",
    "initial_policy",
    "learners",
    "located",
    "model_folder",
    "reward_source",
    "rollout_pool",
    "workers",
]
