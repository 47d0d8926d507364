from formats import Format


class Ternary(Format):
    name, bits, source = "ternary", 2, "the example of the README"
    levels = (-1.0, 0.0, 1.0, 1.0)
