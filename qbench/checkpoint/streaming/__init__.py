"""python -m qbench.quantize: a checkpoint to a packed one, a tensor at a time, however large the model."""
