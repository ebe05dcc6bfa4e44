"""Prompts and labels in, token sequences and micro-batches out."""
