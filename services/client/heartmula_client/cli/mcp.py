"""The command that serves an agent on this machine."""

import click

from heartmula_client.cli.output import Display
from heartmula_client.cli.runtime import ExitStatus, connected, url_option
from heartmula_client.client import AsyncClient


@click.command()
@url_option
def mcp() -> None:
    """Serve an agent that speaks MCP, on standard input and output.

    The agent's program starts it. The service has the same tools at the address /mcp.

    \b
    Example of the agent's configuration:
      {"mcpServers": {"heartmula": {"command": "heartmula", "args": ["mcp"]}}}
    """
    try:
        import heartmula_client.mcp  # noqa: F401
    except ImportError as error:
        raise click.UsageError(f"this needs the package mcp: pip install 'mcp>=2.3,<3' ({error})") from None
    _serve()


@connected
async def _serve(client: AsyncClient, display: Display) -> ExitStatus:
    from heartmula_client.mcp import HttpSongService, SongServer

    service = HttpSongService(client)
    await SongServer(lambda: service).run_stdio_async()
    return ExitStatus.OK
