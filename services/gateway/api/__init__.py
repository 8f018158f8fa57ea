"""What clients reach: HTTP routes, event streams, websockets, NATS requests, the web page."""
