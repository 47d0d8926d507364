"""For who writes a format: `check_format` holds it to the contract, everywhere that qbench will use it.

    from qbench.testing import check_format

    def test_my_format():
        check_format(MyFormat)

It asks for no test framework, and gives every format the same tensors, from the same seeds: a few seconds.
"""

from .check import BrokenContract, check_format, properties

__all__ = ["BrokenContract", "check_format", "properties"]
