"""QuantLinear, the layer that holds a packed weight, and which layers of a model it replaces.

A 16-bit model comes in; the same model with its linear layers packed goes out. Read `quant_linear` first, then
`selection` and `replacement`.

    quant_linear       the layer: a Linear whose weight is packed and frozen
    selection          which layers of a model are quantized, and why others are not
    replacement        puts packed layers into a model, and linear layers back
    quantizing         quantizes the weights of layers, and counts the bytes of a model
    devices            picks the device and the dtype that a model runs on
    parameter_count    makes `model.num_parameters()` count packed weights
    fsdp               keeps FSDP's mixed precision from casting packed weights

The last two are imported together with transformers and FSDP (`qbench.system.import_hooks`).
"""
