"""Serving and batch jobs on Ray: one application for many clients, and one job on many machines."""
