"""python -m qbench, the same as the console script `qbench`."""

import sys

from qbench.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
