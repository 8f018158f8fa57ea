"""Events of songs: one consumer for all of them, and its subscribers."""
