"""The small trained weights that come with the package; `tavq.training.checkpoint` finds them."""
