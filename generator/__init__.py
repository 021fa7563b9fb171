"""The prior: text to image ids."""
