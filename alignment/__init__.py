"""Align the codes of any VQ model with text."""
