"""Restoring of images to memory."""
