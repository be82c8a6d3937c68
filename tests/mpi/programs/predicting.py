"""The command predict, in which one rank fails at its second block: arguments kind, then the command's."""

import os
import resource
import signal
import sys

from gpudbn import predict
from gpudbn.dbn import DBN
from gpudbn.mpi import launch

kind, *arguments = sys.argv[1:]
whole, calls = DBN.predict_probabilities, []


def failing(self, v):
    calls.append(len(v))
    if len(calls) == 2:
        if kind == "fault":
            raise ZeroDivisionError("a fault of ours")
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    return whole(self, v)


if launch.world().rank == (0 if kind == "full" else 2):  # the one that writes, or another
    DBN.predict_probabilities = failing
sys.exit(predict.main(arguments))
