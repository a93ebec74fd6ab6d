"""Metrics, figures, and the paper's published numbers."""
