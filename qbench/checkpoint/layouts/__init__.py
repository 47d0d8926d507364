"""Packed checkpoints in the layouts of others: bitsandbytes', both ways, and GGUF files."""
