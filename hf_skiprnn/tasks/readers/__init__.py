"""Readers that tasks share: words, sounds, videos, and a cache of prepared rows."""
