"""The local stack, as a user starts it."""

import os
import subprocess
import sys
import time
from pathlib import Path

from deploy.local.servers.embedded import S3Server, free_port

ROOT = Path(__file__).parents[2]


class RunningStack:
    """The local stack as `make run` starts it."""

    def __init__(self, data: Path, **settings: str) -> None:
        self.data = data
        self.port, self.nats_port, self.s3_port = free_port(), free_port(), free_port(S3Server.ports)
        env = {name: value for name, value in os.environ.items() if not name.startswith("HEARTMULA_")}
        env |= {
            "HEARTMULA_PORT": str(self.port),
            "HEARTMULA_NATS_PORT": str(self.nats_port),
            "HEARTMULA_S3_PORT": str(self.s3_port),
            "HEARTMULA_DATA_DIR": str(data),
            "HEARTMULA_OUTPUT_PATH": str(data / "songs"),
        } | settings
        self.log = data.parent / "stack.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "deploy.local"], cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def until_ready(self) -> None:
        """Wait for the line that the README names."""
        with self.log.open() as log:
            text = ""
            while f"ready: {self.url}\n" not in text:
                assert self.process.poll() is None, text
                time.sleep(0.05)
                text += log.read()

    def processes(self) -> set[int]:
        """Process ids of the stack and of all its descendants."""
        table = subprocess.run(["ps", "-eo", "pid=,ppid="], capture_output=True, text=True, check=True).stdout
        parents = {int(pid): int(parent) for pid, parent in (line.split() for line in table.splitlines())}
        found = {self.process.pid}
        while more := {pid for pid, parent in parents.items() if parent in found} - found:
            found |= more
        return found
