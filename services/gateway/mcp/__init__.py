"""MCP for agents at ``/mcp``: the client's tools over this gateway's own parts."""
