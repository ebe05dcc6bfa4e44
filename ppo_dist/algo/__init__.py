"""The algorithm as pure functions on tensors: no I/O, no Ray, no DeepSpeed."""
