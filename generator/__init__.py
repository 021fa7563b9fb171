"""The generator: text to image ids."""
