"""The policy and the critic around a transformers model."""
