"""The demo: write tracking and dirty logging side by side, on a guest that writes."""
