"""Makes an API key: ``python -m services.gateway.keys new alice``."""

import secrets
import sys

from services.gateway.auth.access import digest_of_key
from shared.schema.base import TENANT_NAME

_USAGE = "usage: python -m services.gateway.keys new NAME (of letters, digits, - and _)"


def main(arguments: list[str]) -> int:
    """Print a new key, and what to write into the file. Returns an exit code."""
    if len(arguments) != 2 or arguments[0] != "new" or not TENANT_NAME.fullmatch(arguments[1]):
        sys.stderr.write(f"{_USAGE}\n")
        return 2
    key = f"hm_{secrets.token_urlsafe(32)}"
    sys.stderr.write(f"The key, which is stored nowhere:\n  {key}\nFor the file of HEARTMULA_API_KEYS:\n")
    sys.stdout.write(f'[[tenant]]\nname = "{arguments[1]}"\nkeys = ["{digest_of_key(key)}"]\n')
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
