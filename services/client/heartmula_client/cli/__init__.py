"""The command line ``heartmula``."""

from heartmula_client.cli.commands import main

__all__ = ["main"]
