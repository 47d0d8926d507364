"""qbench COMMAND …: runs the command that the first word names; without one, a run or a sweep.

`python -m qbench COMMAND`, `python -m qbench.COMMAND` and the console script `qbench COMMAND` all come here.
"""

import os
import re
import sys
from difflib import get_close_matches
from importlib import import_module

from . import COMMANDS


def main() -> int:
    """Run the command that sys.argv names. Returns its exit code: 0 done, 1 failed, 2 bad input, 130 interrupted."""
    if "_ARGCOMPLETE" in os.environ:
        from .completion import complete

        complete()
    word = sys.argv[1] if len(sys.argv) > 1 else ""
    if word in COMMANDS:
        del sys.argv[1]
        return run_command(COMMANDS[word])
    if re.fullmatch(r"[A-Za-z][\w.-]*", word):
        near = get_close_matches(word, COMMANDS, 1)
        accepted = f"did you mean {near[0]}?" if near else f"accepted: {', '.join(COMMANDS)}, or key=value"
        sys.stderr.write(f"qbench: {word!r} is not a command; {accepted}\n")
        return 2
    return run_command(COMMANDS["run"])


def run_command(module: str) -> int:
    """Run the command of a module of this package with the arguments in sys.argv. Returns its exit code."""
    from qbench.errors import InputError
    from qbench.system import messages
    from qbench.system.interrupts import interruptible

    messages.replace_unencodable()
    try:
        with interruptible():
            from . import arguments

            if module in arguments.PARSERS:  # help and mistakes need not wait for the imports of the command
                arguments.parse(module, sys.argv[1:])
            command = import_module(module)
        return command.main()
    except InputError as error:
        sys.stderr.write(f"qbench: {error}\n")
        return 2
    except KeyboardInterrupt:
        sys.stderr.write("qbench: interrupted\n")
        return 130
