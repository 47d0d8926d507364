"""Packs a checkpoint one tensor at a time, so that the model need not fit into memory: `python -m qbench quantize`.

source    opens the 16-bit checkpoint and matches its tensors with the model
stream    writes the packed checkpoint, and resumes after an interruption
"""
