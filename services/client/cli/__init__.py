"""The command line ``heartmula``."""

from services.client.cli.commands import main

__all__ = ["main"]
