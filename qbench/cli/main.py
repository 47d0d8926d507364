"""qbench COMMAND …: one run or a sweep, unless the first word names another command."""

import sys
from importlib import import_module

#: the first word of a command line, and the module that does what it asks
COMMANDS = {
    "run": "qbench.cli.run",
    "report": "qbench.cli.report",
    "plan": "qbench.cli.plan",
    "quantize": "qbench.cli.quantize",
    "bench": "qbench.cli.bench",
    "runs": "qbench.cli.runs",
}


def main() -> int:
    """Run the command that sys.argv names. Returns its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    name = sys.argv[1] if len(sys.argv) > 1 and sys.argv[1] in COMMANDS else None
    if name:
        del sys.argv[1]
    return import_module(COMMANDS[name or "run"]).main()
