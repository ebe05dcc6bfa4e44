"""Trains policy and critic, and annotates rollouts with them and the reference."""

from ppo_dist import device

device.tell_deepspeed()
