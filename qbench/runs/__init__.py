"""One run: load a model, measure it, quantize it, measure it, fine-tune it, measure it, write the report.

In: `Settings` and a folder. Out: result.json, report.md and the adapters in that folder. Start with `experiment`.

    experiment     the whole run as a sequence of steps
    context        what every step uses: settings, folder, device, timers, the result
    inputs         open model and text, identify the run, load the weights
    scoring        measure quality, memory and speed of the model at each stage
    quantization   quantize the model, and measure error and size
    fine_tuning    add adapters, train them, quantize or merge them
    task_stages    score lm-eval tasks at each stage
    baseline       measurements of the 16-bit model, shared by the runs of a sweep
    progress       progress bars, seconds and memory peaks
    trackers       TensorBoard, MLflow, Weights & Biases
    isolated       call a function in a process of its own
"""
