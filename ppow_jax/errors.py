"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message names the offending value, the rule it breaks and the place (file and line, or flag).
    Entry points print it without a traceback and leave with exit code 2.
    """
