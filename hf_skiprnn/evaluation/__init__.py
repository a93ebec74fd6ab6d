"""Evaluation: metrics, figures, the paper's published numbers, and atomic writing of files."""
