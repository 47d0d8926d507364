"""Will a fine-tune fit? The memory of a training step of a model, counted line by line before anything is loaded.

In go the shape of a model and the settings of a plan. Out comes a `Plan`: bytes by line and moment, and whether the step
fits a GPU. Read count.py first.

    settings.py  the assumptions of a plan
    shapes.py    models without weights: built-in shapes, folders, hub ids
    count.py     counts the memory of one step, line by line
    step.py      runs the step on the meta device, to count what it allocates and frees
    advice.py    finds changes that make a step fit, and the formats that fit
    check.py     measures a real step, to compare it with its plan
    paper.py     compares the plan with QLoRA's memory table
    wording.py   shows plans in sentences and tables, and as JSON
    figures.py   draws plans as stacked bars
"""
