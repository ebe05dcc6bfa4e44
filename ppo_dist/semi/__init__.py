"""The semi-supervised policy: how much of each kind of learning, step by step. Pure and
checkpointable.
"""
