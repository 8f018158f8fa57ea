"""HTTP, websockets and the web page in front of JetStream. Never imports torch."""
