"""The whole system on this machine, as `make run` starts it."""
