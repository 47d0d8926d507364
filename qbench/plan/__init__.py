"""Will it fit? What a training step of a model needs in memory, line by line, before anything is loaded."""
