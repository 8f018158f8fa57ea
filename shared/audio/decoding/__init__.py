"""From the bytes of an upload, which nothing is known of, to audio: decoded in a child process with limits."""
