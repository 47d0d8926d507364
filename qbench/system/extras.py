"""What to type for a package that is missing."""

from importlib.metadata import PackageNotFoundError, requires

DISTRIBUTION = "qbench-formats"  #: as pip knows qbench


def install(extra: str) -> str:
    """What to type for the packages of an extra: their own names, which are right wherever qbench was installed from."""
    from packaging.requirements import Requirement

    try:
        found = [Requirement(line) for line in requires(DISTRIBUTION) or ()]
    except PackageNotFoundError:  # a checkout that nothing installed
        found = []
    needed = [f"'{r.name}{r.specifier}'" for r in found if f'extra == "{extra}"' in str(r.marker)]
    return f"pip install {' '.join(needed or [extra])}"
