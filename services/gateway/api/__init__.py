"""The gateway's interfaces for clients: HTTP routes, event streams, websockets, NATS requests, the web page."""
