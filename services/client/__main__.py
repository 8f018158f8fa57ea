"""``python -m services.client``: the command line."""

from services.client.cli import main

main()
