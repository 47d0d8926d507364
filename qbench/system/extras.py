"""The command that installs a missing package."""

from importlib.metadata import PackageNotFoundError, requires

DISTRIBUTION = "qbench-formats"  #: the name of qbench on PyPI


def install_command(extra: str) -> str:
    """Returns the command that installs the packages of an extra.

    It names the packages themselves, so it is right wherever qbench was installed from.
    """
    from packaging.requirements import Requirement

    try:
        requirements = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:  # a checkout that is not installed
        requirements = []
    needed = [f"'{r.name}{r.specifier}'" for r in requirements if f'extra == "{extra}"' in str(r.marker)]
    return f"pip install {' '.join(needed or [extra])}"
