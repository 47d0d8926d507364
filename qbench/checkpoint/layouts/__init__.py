"""Packed checkpoints in the layouts of other libraries.

base            the interface of a packed checkpoint
bitsandbytes    reads and writes 4-bit checkpoints of bitsandbytes
gguf            reads GGUF files of llama.cpp
"""
