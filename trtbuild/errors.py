"""The one exception that a user is meant to read."""


class UserError(Exception):
    """A mistake outside the program: one line that says what is wrong, where, and what would be right.

    The command line prints it without a traceback and exits with 2; a workflow rule ends its log with it.
    """
