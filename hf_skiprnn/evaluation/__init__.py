"""Evaluation: metrics, figures, the paper's published numbers, and files written whole."""
