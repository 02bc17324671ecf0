"""Mistakes a person can mend, told in one sentence."""


class UserError(Exception):
    """A wrong value, a missing thing or a taken place: the message names it and says what to do.

    Stages that raise it are not retried, leave nothing half-written behind, and the command line
    prints the message without a traceback.
    """


class Unfinished(UserError):
    """Work that cannot go on as it is, but of which something is worth keeping.

    As for any UserError nothing is retried; what the stage wrote so far stays.
    """


class Unavailable(UserError):
    """A service does not answer now; nothing is wrong with what was asked for.

    The stage is tried again and what it wrote so far, checkpoints above all, is kept.
    """
