"""A worker process for any stage: heartbeats, turns on the device, and the songs in them."""
