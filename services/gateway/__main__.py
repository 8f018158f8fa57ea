"""``python -m services.gateway``: configured by environment variables, see docs/configuration.md."""

import sys

import uvloop

from services.gateway.server import serve
from shared.entrypoint import run

if __name__ == "__main__":
    sys.exit(run(serve, uvloop.run))
