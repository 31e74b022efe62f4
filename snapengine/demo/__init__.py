"""Both methods on a busy guest, side by side."""
