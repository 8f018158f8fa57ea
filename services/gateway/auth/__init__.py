"""Who calls, from which pages, and how much they may ask for."""
