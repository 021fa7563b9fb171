"""Image-text datasets, images <-> tensors, text units, and the frozen text encoder with its cache."""
