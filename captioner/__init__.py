"""Image ids to text."""
