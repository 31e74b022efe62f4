"""A guest process that writes to its memory, and the oracle that checks whether an image is consistent."""
