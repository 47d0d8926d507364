"""What went wrong on the user's side of things."""


class InputError(Exception):
    """Bad input. The message is one line that names the input and says what would be accepted."""


class RunTimeout(BaseException):
    """A run took longer than its limit. No Exception, so that no library on the way takes it for its own."""


def integer(name: str, value: object, at_least: int = 1) -> None:
    """Raise InputError unless `value` is an integer of at least `at_least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise InputError(f"{name}: {value!r} is not accepted; an integer of at least {at_least} is")
