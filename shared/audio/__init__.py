"""Audio files and the peaks to draw them from."""
