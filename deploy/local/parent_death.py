"""Run a command that is killed when the process that started it dies, whatever it died of.

::

    python parent_death.py <pid of the starter> <command> <argument>…

It asks the kernel for SIGKILL at the starter's death, then becomes the command. A `preexec_fn` could do the same, but
runs Python between fork and exec, where a lock held by another thread hangs the child. The kernel means the *thread*
that started the child: start children from the main thread. Only Linux has this; elsewhere the command just runs.
"""

import ctypes
import os
import signal
import sys

_PR_SET_PDEATHSIG = 1


def main(starter: int, command: list[str]) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != starter:  # it died before the request was made
            sys.exit(1)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(f"{command[0]} cannot be run: {error.strerror}")


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
