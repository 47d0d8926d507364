"""Measures a model: its quantization error, quality on text and tasks, memory and throughput.

In go models, tokens and packed layers; out come numbers as dicts, in the form of result.json. Read quality.py first.

    distribution  a histogram of the normalized weights
    error         the quantization error of weights and of layer outputs
    live_tensors  the bytes of live tensors, counted operation by operation
    memory        the peak memory of a phase
    quality       negative log-likelihood and KL divergence on held-out text
    statistics    standard errors, and the paired difference of two models
    task_files    finds the files of lm-eval tasks
    task_scores   scores of tasks, compared with the baseline by document
    tasks         runs lm-eval's tasks on a model in memory
    throughput    tokens and weights a second
"""
