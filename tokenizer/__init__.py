"""Images to grids of ids and back, the codebook aligned with text."""
