"""An embedded guest that writes to its memory, and the oracle that proves whether an image is consistent."""
