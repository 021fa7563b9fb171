"""The one training loop, checkpoints, resume and logging."""
