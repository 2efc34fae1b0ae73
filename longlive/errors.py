"""The one exception that means: the user can put this right.

Layer 0. Command lines print its message as one line on stderr and exit with 2; everything else is a bug and
keeps its traceback.
"""


class InputError(ValueError):
    """Bad input from a user: names the offending value or file and says what would be accepted."""
