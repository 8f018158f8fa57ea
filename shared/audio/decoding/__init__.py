"""From bytes that a stranger uploads to audio that can be trusted: decoded in a child process with limits."""
