"""Audio tokens to stereo audio, on the device, while the lease allows it."""
