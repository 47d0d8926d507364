"""What went wrong on the user's side of things."""


class InputError(Exception):
    """Bad input. The message is one line that names the input and says what would be accepted."""
