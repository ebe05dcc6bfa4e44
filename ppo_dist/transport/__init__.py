"""The ways that weights travel from the learner to the rollout workers, one file per medium."""
