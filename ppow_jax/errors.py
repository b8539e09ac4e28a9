"""The exception for mistakes of the user."""


class UserError(Exception):
    """A mistake that the user can correct.

    The message names the offending value, the rule it breaks and the place (file and line, or flag).
    Entry points print it without a traceback and exit with code 2.
    """
