"""The policy and the critic around a transformers model."""

from transformers.utils import logging

from ppo_dist import device

device.tell_deepspeed()  # transformers looks for DeepSpeed as soon as a model is imported
logging.disable_progress_bar()  # one bar per worker and file would bury the run's own line
