"""Trains policy and critic, and annotates rollouts with them and the reference."""
