"""``python -m deploy.local``: run the whole system on this machine until Ctrl-C."""

import asyncio
import os
import sys

from deploy.local.stack import Stack
from shared.entrypoint import quiet_libraries
from shared.errors import ConfigError, HeartMulaError
from shared.settings import Settings


async def _run() -> None:
    await Stack(Settings.load(), os.environ).run()


def main() -> int:
    """Run the stack; returns the exit code: 0 after a signal, 1 when a part failed, 2 when a setting is wrong."""
    try:
        quiet_libraries()
        asyncio.run(_run())
    except HeartMulaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
