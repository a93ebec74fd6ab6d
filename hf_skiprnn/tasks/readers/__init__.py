"""Modules that tasks share: readers of words, sounds and videos, and a cache of prepared rows."""
