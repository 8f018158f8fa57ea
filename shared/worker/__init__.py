"""A worker process, whatever its stage: heartbeats, turns on the device, and the songs in them."""
