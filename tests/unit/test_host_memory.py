"""Host memory to spare, from the files of control groups and machines as Linux writes them."""

from pathlib import Path

import pytest

from shared.device.host_memory import GROUP_RESERVE, shortage, spare_bytes

GIB = 2**30
UNLIMITED_V1 = 0x7FFFFFFFFFFFF000  # what version 1 says for no limit


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def machine(root: Path, total: int, available: int) -> None:
    """A machine's memory in GiB."""
    lines = f"MemTotal:  {total << 20} kB\nMemFree:  1 kB\nMemAvailable:   {available << 20} kB\nHugePages_Total:   0\n"
    write(root, {"proc/meminfo": lines})


def group(root: Path, folder: str, limit: object, used: int, cache: int = 0) -> None:
    """A control group of version 2; `used` and `cache` in GiB."""
    files = {
        "memory.max": f"{limit}\n",
        "memory.current": f"{used * GIB}\n",
        "memory.stat": f"anon 5\nfile {9 * GIB}\ninactive_file {cache * GIB}\nactive_file 7\n",
    }
    write(root, {f"sys/fs/cgroup/{folder}/{name}": text for name, text in files.items()})


def test_a_machine_without_groups_keeps_an_eighth(tmp_path: Path) -> None:
    machine(tmp_path, total=32, available=20)
    assert spare_bytes(tmp_path) == 16 * GIB
    machine(tmp_path, total=32, available=3)
    assert spare_bytes(tmp_path) == 0


def test_a_pod_may_take_what_its_limit_leaves_and_page_cache_does_not_count(tmp_path: Path) -> None:
    machine(tmp_path, total=256, available=200)
    write(tmp_path, {"proc/self/cgroup": "0::/\n"})
    group(tmp_path, ".", 16 * GIB, used=13, cache=4)
    assert spare_bytes(tmp_path) == 7 * GIB - GROUP_RESERVE
    group(tmp_path, ".", 16 * GIB, used=16)
    assert spare_bytes(tmp_path) == 0


def test_the_narrowest_of_a_groups_ancestors_counts(tmp_path: Path) -> None:
    machine(tmp_path, total=256, available=200)
    write(tmp_path, {"proc/self/cgroup": "0::/kube/pod/container\n"})
    group(tmp_path, "kube/pod/container", "max", used=2)
    assert spare_bytes(tmp_path) == 168 * GIB
    group(tmp_path, "kube/pod", 10 * GIB, used=4)
    group(tmp_path, "kube", 100 * GIB, used=50)
    assert spare_bytes(tmp_path) == 6 * GIB - GROUP_RESERVE


def test_a_containers_group_is_found_though_its_path_is_the_hosts(tmp_path: Path) -> None:
    machine(tmp_path, total=256, available=200)
    write(tmp_path, {"proc/self/cgroup": "0::/kubepods/pod7/ab12\n"})
    group(tmp_path, ".", 8 * GIB, used=3)
    assert spare_bytes(tmp_path) == 5 * GIB - GROUP_RESERVE


@pytest.mark.parametrize(("limit", "spare"), [(16 * GIB, 7 * GIB - GROUP_RESERVE), (UNLIMITED_V1, 168 * GIB)])
def test_version_1_counts_likewise(limit: int, spare: int, tmp_path: Path) -> None:
    machine(tmp_path, total=256, available=200)
    folder = "sys/fs/cgroup/memory/docker/ab12"
    write(
        tmp_path,
        {
            "proc/self/cgroup": "5:cpu,cpuacct:/docker/ab12\n4:memory:/docker/ab12\n1:name=systemd:/x\n0::/\n",
            f"{folder}/memory.limit_in_bytes": f"{limit}\n",
            f"{folder}/memory.usage_in_bytes": f"{13 * GIB}\n",
            f"{folder}/memory.stat": f"inactive_file 1\ntotal_inactive_file {4 * GIB}\n",
        },
    )
    assert spare_bytes(tmp_path) == spare


@pytest.mark.parametrize("meminfo", [None, "", "MemTotal: 5 kB\n", "nonsense"])
def test_a_system_that_does_not_tell_has_nothing_to_spare(meminfo: str | None, tmp_path: Path) -> None:
    if meminfo is not None:
        write(tmp_path, {"proc/meminfo": meminfo})
    assert spare_bytes(tmp_path) == 0


def test_this_system_can_be_read() -> None:
    assert spare_bytes() >= 0


def test_what_is_missing_for_a_large_block_is_told(tmp_path: Path) -> None:
    assert shortage(100 * GIB, tmp_path) == 0, "without figures, nothing is known to be missing"
    machine(tmp_path, total=32, available=7)
    assert [shortage(n * GIB, tmp_path) for n in (3, 5)] == [0, 2 * GIB]
    machine(tmp_path, total=32, available=1)
    assert shortage(GIB // 8, tmp_path) == 0, "the reserve is there for what is small"
