"""Renditions of finished audio."""
