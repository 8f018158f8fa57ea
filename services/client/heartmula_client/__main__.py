"""The command line, as ``heartmula`` and ``python -m heartmula_client``."""

import sys
from typing import NoReturn


def main() -> NoReturn:
    """Run the command line and exit. Without the packages of the extra ``cli`` it says how to install them."""
    try:
        from heartmula_client.cli import main as run
    except ModuleNotFoundError as error:
        if error.name not in ("click", "rich"):
            raise
        sys.exit(f"heartmula needs pip install 'heartmula-client[cli]' ({error.name} is missing)")
    run()


if __name__ == "__main__":
    main()
