"""Standard error for messages, and the exit code of Ctrl-C, for every command."""

from rich.console import Console

INTERRUPTED = 130  #: exit code
stderr = Console(stderr=True, highlight=False, soft_wrap=True, markup=False)
