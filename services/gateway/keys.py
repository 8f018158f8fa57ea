"""The command that makes an API key: ``python -m services.gateway.keys new alice``."""

import sys

from services.gateway.auth.api_keys import create_key
from shared.schema.base import TENANT_NAME

_USAGE = "usage: python -m services.gateway.keys new NAME (of letters, digits, - and _)"


def main(arguments: list[str]) -> int:
    """Print a new key to stderr and its entry of the key file to stdout. Returns an exit code."""
    if len(arguments) != 2 or arguments[0] != "new" or not TENANT_NAME.fullmatch(arguments[1]):
        sys.stderr.write(f"{_USAGE}\n")
        return 2
    key, entry = create_key(arguments[1])
    sys.stderr.write(f"The key, which is stored nowhere:\n  {key}\nFor the file of HEARTMULA_API_KEYS:\n")
    sys.stdout.write(entry)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
