"""The loop and what it remembers. Knows protocols only."""
