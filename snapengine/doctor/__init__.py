"""What this host can do, and what a capture of a process would meet."""
