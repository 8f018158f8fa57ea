"""``python -m services.client``: the command line."""

from services.client.cli.commands import main

main()
