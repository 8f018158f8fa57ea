"""Monitoring of the system: health, metrics, diagnostics, workers, devices."""
