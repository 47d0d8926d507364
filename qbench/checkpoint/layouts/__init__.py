"""Packed checkpoints in the layouts of other libraries.

base            what every packed checkpoint gives to its reader
bitsandbytes    reads and writes 4-bit checkpoints of bitsandbytes
gguf            reads GGUF files of llama.cpp
"""
