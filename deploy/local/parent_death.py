"""Run a command that the kernel kills when the process that started it dies, however it dies.

::

    python parent_death.py <pid of the starter> <command> <argument>…

This program sets the parent-death signal to SIGKILL, then executes the command. A `preexec_fn` could do the same, but
runs Python between fork and exec, where a lock held by another thread hangs the child. The signal is sent when the
*thread* that started the child ends, so start children from the main thread. Only Linux has this signal; elsewhere
the command is run without it.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(starter: int, command: list[str]) -> None:
    """Replace this process by `command`, or exit with 1 where `starter` has died or the command cannot be run."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != starter:  # the starter died before prctl was called
            sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run: {error.strerror}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
