"""Fine-tunes a model: reads the text, adds adapters, trains them, and merges them.

In go a model with packed layers, a text file and `tune` settings. Out come the trained model and a log of every step.
Read loop.py first.

    adapters    adds PEFT adapters to a model, and checks beforehand that training can work
    data        reads text, holds part of it out, and cuts it into windows and examples
    lora_init   initializes LoRA so that it compensates the quantization error
    lora_layer  the LoRA layer that PEFT puts on packed layers
    loop        the training loop
    losses      the next-token loss
    merging     merges trained adapters into the weights, or quantizes them
    optim/      the optimizers, with paged and 8-bit states
"""
