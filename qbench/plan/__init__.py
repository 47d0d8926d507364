"""Will a fine-tune fit? The memory of a training step of a model, counted line by line before anything is loaded.

In comes the shape of a model and the settings of a plan, out comes a `Plan`: bytes by line and moment, and whether the
step fits a GPU. Read count.py first.

    settings.py  what a plan assumes
    shapes.py    models without weights: built-in shapes, folders, hub ids
    count.py     the memory of one step: what is held, and what comes and goes
    step.py      the step itself, run on the meta device, to count what comes and goes
    advice.py    what would make a step fit, and which formats do
    check.py     a real step, measured beside its plan
    paper.py     the plan beside QLoRA's memory table
    wording.py   plans in sentences and tables, and as JSON
    figures.py   plans as stacked bars
"""
