"""Host memory that a process may still take: what the limits of its control groups and its machine leave."""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

GROUP_RESERVE = 2**30  # bytes below the limit of a control group that stay free
MACHINE_RESERVE = 8  # a machine's other programs keep one part in so many of its memory


class _Files(NamedTuple):
    """Names of a memory controller's files, and of the page cache in its ``memory.stat`` that is freed on demand."""

    limit: str
    used: str
    cache: str


_V1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Files("memory.max", "memory.current", "inactive_file")


def spare_bytes(root: Path = Path("/")) -> int:
    """Bytes that this process may take without harm, at least 0; 0 too where the system does not tell.

    The least of what the limits of its control groups (version 1 or 2, all ancestors) leave and of what the machine has
    available, each less a reserve. `root` is the folder with ``proc`` and ``sys``.
    """
    machine = _table(root / "proc/meminfo")  # in units of 1024 bytes
    if "MemAvailable" not in machine or "MemTotal" not in machine:
        return 0
    spare = [1024 * (machine["MemAvailable"] - machine["MemTotal"] // MACHINE_RESERVE)]
    for folder, files in _groups(root):
        limit, used = _number(folder / files.limit), _number(folder / files.used)
        if limit is not None and used is not None:
            spare.append(limit - used + _table(folder / "memory.stat").get(files.cache, 0) - GROUP_RESERVE)
    return max(0, min(spare))


def shortage(needed: int, root: Path = Path("/")) -> int:
    """Bytes that are missing for a process to take `needed` bytes; 0 where they are there, or cannot be counted.

    What is small beside the reserves may always be taken: that is what they are for.
    """
    if needed <= GROUP_RESERVE // 4 or "MemAvailable" not in _table(root / "proc/meminfo"):
        return 0
    return max(0, needed - spare_bytes(root))


def _groups(root: Path) -> Iterator[tuple[Path, _Files]]:
    """The folders of this process's control groups and of their ancestors.

    In a container the path may be one of the host's, of which only the last folder is there, mounted as the root.
    """
    for line in _text(root / "proc/self/cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            mount, files = root / "sys/fs/cgroup", _V2
        elif "memory" in controllers.split(","):
            mount, files = root / "sys/fs/cgroup/memory", _V1
        else:
            continue
        folder = mount / path.lstrip("/")
        for each in (folder, *folder.parents):
            yield each, files
            if each == mount:
                break


def _table(path: Path) -> dict[str, int]:
    """A file's lines of a name, with or without a colon, and a number."""
    lines = [line.replace(":", "").split() for line in _text(path).splitlines()]
    return {words[0]: int(words[1]) for words in lines if len(words) > 1 and words[1].isdigit()}


def _number(path: Path) -> int | None:
    """A file's number; None where there is no such file or no limit ("max")."""
    text = _text(path).strip()
    return int(text) if text.isdigit() else None


def _text(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
