"""The ways a run may fail on purpose.

Everything else that is raised is a fault of ours and shows its traceback.
"""


class UserError(ValueError):
    """Something the caller can mend; one line: ``what: must ...; got .... hint``.

    The commands print it without a traceback and exit with code 2.
    """


class NonFiniteError(ArithmeticError):
    """Parameters became NaN or infinite; names the layer and the update. Exit code 3."""


class LostError(RuntimeError):
    """Processes without which the run cannot go on are gone; names them. Exit code 4: it can be resumed."""


class PartLostError(LostError):
    """Another part of this replica is gone: the replica cannot go on, others may."""
