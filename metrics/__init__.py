"""FID and CIDEr families: pure functions on arrays and strings."""
