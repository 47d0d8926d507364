"""The version of qbench; `qbench.__version__` is the same."""

VERSION = "0.1.0"
