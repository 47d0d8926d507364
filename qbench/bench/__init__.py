"""Benchmarks of the kernels and of a training step; the commands are `python -m qbench bench` (cli/bench.py).

In go formats, layer shapes and numbers of rows; out come timings as a dict, a page and a figure. Read products.py first.

    products  times the products with a packed weight, against bf16 weights and bitsandbytes
    page      shows these timings: sentences, tables and a figure
    step      times a QLoRA training step, against PEFT with bitsandbytes
    tiles     finds the fastest kernel and tile sizes for the GPU at hand
    compiled  compiles every kernel without a GPU, and counts registers, spills and instructions
    timing    times calls, and measures the ceilings of the device
"""
