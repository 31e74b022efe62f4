"""What people read: tables, progress, plots, and standard streams."""
