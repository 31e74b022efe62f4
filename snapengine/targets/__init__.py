"""Whose memory is saved: what every target has in common, and buffers of this process."""
