"""What Triton needs beside itself to run a kernel."""


def missing_compiler() -> str | None:
    """What is missing, in words, or None."""
    return None
