"""Embedded NATS server."""

import asyncio
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal, get_args

import nats

from deploy.local.process import Process
from deploy.local.servers.base import Server, binary
from shared.errors import NotFound, Unavailable
from shared.nats.errors import nats_errors

Role = Literal["operator", "bootstrap", "gateway", "tokenizer", "codec", "client"]
ROLES: tuple[Role, ...] = get_args(Role)

_NATS_CONFIG = Path(__file__).parents[2] / "nats" / "nats.conf"


class NatsServer(Server):
    """nats-server with JetStream, on the loopback interface, with the users of ``deploy/nats/roles.conf``."""

    name = "nats"
    variable = "HEARTMULA_NATS_PORT"

    def __init__(self, data_dir: Path, port: int, passwords: Mapping[Role, str], monitor_port: int = 0) -> None:
        """`monitor_port` serves the server's monitoring endpoints without a password; 0 switches them off."""
        if not all(re.fullmatch(r"[A-Za-z0-9_-]+", passwords[role]) for role in ROLES):
            raise ValueError(
                "passwords may hold letters, digits, - and _ only: they stand in URLs that nats-py does not unquote"
            )
        self._passwords = passwords
        self.monitor_port = monitor_port
        super().__init__(data_dir, port)

    @property
    def url(self) -> str:
        """``nats://user:password@127.0.0.1:port`` of the role `operator`, which may do everything."""
        return self.url_of("operator")

    def url_of(self, role: Role) -> str:
        """Return ``nats://user:password@127.0.0.1:port`` of a role."""
        return f"nats://{role}:{self._passwords[role]}@127.0.0.1:{self.port}"

    def _process(self) -> Process:
        monitor = ["-m", str(self.monitor_port)] if self.monitor_port else []
        values = {"LISTEN": f"127.0.0.1:{self.port}", "STORE": str(self.data_dir / "nats")}
        values |= {f"{role.upper()}_PASSWORD": self._passwords[role] for role in ROLES}
        return Process(
            self.name,
            [binary("nats-server"), "-c", str(_NATS_CONFIG), *monitor],
            # The server reads the values as configuration, in which quotes make any text a string.
            env={f"NATS_{name}": json.dumps(value, ensure_ascii=False) for name, value in values.items()},
            log=self.data_dir / "logs" / "nats.log",
            umask=0o077,
        )

    def _ports(self) -> list[int]:
        return [port for port in (self.port, self.monitor_port) if port]

    def _prepare(self) -> None:
        """Write nothing: the configuration is part of the project."""

    async def _answers(self) -> bool:
        try:
            with nats_errors("no answer"):
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)  # nats-py waits 2 s when refused
                writer.close()
                client = await nats.connect(self.url, allow_reconnect=False, connect_timeout=2, error_cb=_ignore)
                try:
                    await client.jetstream().account_info()
                finally:
                    await client.close()
        except (Unavailable, NotFound):
            return False
        return True


async def _ignore(error: Exception) -> None:
    """Ignore an error: while a server starts, refused connections are expected."""
