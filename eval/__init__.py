"""Evaluation runs, result files, tables and reports."""
