"""For authors of formats: `check_format` tests a format against the contract, wherever qbench will use it.

    from qbench.testing import check_format

    def test_my_format():
        check_format(MyFormat)

It needs no test framework and takes a few seconds. Every format gets the same tensors, from the same seeds.
"""

from .check import BrokenContract, check_format, properties

__all__ = ["BrokenContract", "check_format", "properties"]
