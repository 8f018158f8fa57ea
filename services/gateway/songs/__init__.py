"""Songs as users see them: status, cancelling, the index, event feeds, queue positions, ETA."""
