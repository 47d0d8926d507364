"""Speed: of the kernels, of a training step, and what the compiler makes of the kernels where there is no GPU."""
