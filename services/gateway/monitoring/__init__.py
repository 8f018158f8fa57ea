"""What the gateway reports of the system: health, metrics, diagnostics, workers, devices."""
