"""``python -m services.gateway``"""

import logging
import sys

import uvloop

from services.gateway.server import quieten, serve
from shared.errors import ConfigError, Unavailable
from shared.settings import Settings


def main() -> int:
    """Run the gateway to its end; returns the exit code."""
    try:
        settings = Settings.load()
        settings.require_servers()
        logging.basicConfig(
            level=settings.log_level.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s"
        )
        quieten()
        uvloop.run(serve(settings))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Unavailable as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:  # while waiting for the servers
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
