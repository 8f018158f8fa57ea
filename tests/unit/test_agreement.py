"""Workers on a device agree whether models stay on it."""

import subprocess
import sys
from pathlib import Path

from shared.device.agreement import Agreement

OTHER = """
import sys
from pathlib import Path
from shared.device.agreement import Agreement
agreement = Agreement(Path(sys.argv[1]), sys.argv[2] == "stays")
print(agreement.broken(), flush=True)
sys.stdin.read()
"""


def other(folder: Path, way: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", OTHER, str(folder), way]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_workers_of_one_way_agree_and_one_of_the_other_is_seen_until_it_is_gone(tmp_path: Path) -> None:
    folder = tmp_path / "card"
    mine = Agreement(folder, stays=True)
    assert not mine.broken()
    with other(folder, "stays") as alike, other(folder, "turns") as unlike:
        assert alike.stdout is not None
        assert unlike.stdout is not None
        assert unlike.stdout.readline() == "True\n"
        alike.stdout.readline()
        assert mine.broken()
        unlike.kill()
        unlike.wait()
        assert not mine.broken(), "a killed process still counts"
        alike.kill()
    again = Agreement(folder, stays=False)
    assert again.broken()
    mine.close()
    assert not again.broken()
    again.close()
