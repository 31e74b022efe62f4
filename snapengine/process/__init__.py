"""How another process is attached to, described and stopped."""
