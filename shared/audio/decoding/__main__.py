"""The decoder's process: a file on its input, FLAC to a descriptor, a report to its output; see `child_process`.

    python -m shared.audio.decoding TARGET LIMITS

It opens nothing: all its files are open when it begins, and its limits are set before it reads the first byte.
"""

import os
import resource
import signal
import sys
import traceback

import msgspec

from shared.audio.decoding.decoder import decode
from shared.audio.decoding.messages import DecodingLimits


def main(target: int, limits: DecodingLimits) -> None:
    """Set the limits, decode the input, and report: in the last line, behind what the interpreter complained of."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # on which the libraries complain of every frame
    confine(limits)
    try:
        report = msgspec.json.encode(decode(0, target, limits))
    except BaseException:
        os.write(1, traceback.format_exc().encode())
        os._exit(1)
    os.write(1, b"\n" + report)
    os._exit(0)  # whatever state the libraries are in


def confine(limits: DecodingLimits) -> None:
    """Give up everything that decoding does not need. The process ends by a signal where it takes more time."""
    os.nice(10)  # the gateway answers meanwhile
    for kind, most in (
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NOFILE, 0),  # new ones
        (resource.RLIMIT_NPROC, 0),
        (resource.RLIMIT_FSIZE, limits.output_bytes),
        (resource.RLIMIT_AS, limits.address_space),
    ):
        resource.setrlimit(kind, (most, most))
    resource.setrlimit(resource.RLIMIT_CPU, (limits.cpu_seconds, limits.cpu_seconds + 1))
    signal.setitimer(signal.ITIMER_REAL, limits.wall_seconds)  # for when the gateway does not live to end it


if __name__ == "__main__":
    main(int(sys.argv[1]), msgspec.json.decode(sys.argv[2], type=DecodingLimits))
