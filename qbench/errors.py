"""The errors that a user causes: bad input, and a run that exceeds its time limit."""

import re

UNITS = {unit: 1000**power for power, unit in enumerate(("b", "kb", "mb", "gb", "tb"))}
UNITS |= {unit: 1024**power for power, unit in enumerate(("", "kib", "mib", "gib", "tib"))}


class InputError(Exception):
    """Bad input. The message is one line that names the input and says what would be accepted."""


class RunTimeout(BaseException):
    """A run took longer than its limit. It is not an Exception, so that no library catches it."""


def integer(name: str, value: object, at_least: int = 1) -> None:
    """Raise InputError unless `value` is an integer of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise InputError(f"{name}: {value!r} is not accepted; an integer of at least {at_least} is")


def byte_count(name: str, value: object, at_least: int = 1) -> int:
    """Parse a number of bytes: an integer, or text such as "64MB" or "1.5 GiB". Raises InputError for other values."""
    pattern = r"(\d{1,30}(?:\.\d{1,30})?) ?([kmgt]?i?b?)"
    match = None if isinstance(value, bool) else re.fullmatch(pattern, str(value).lower())
    if not match or match[2] not in UNITS or (n := round(float(match[1]) * UNITS[match[2]])) < at_least:
        raise InputError(
            f"{name}: {value!r} is not accepted; bytes are, such as 67108864, 64MB or 1.5GiB, {at_least} or more"
        )
    return n
