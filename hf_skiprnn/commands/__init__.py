"""What `scripts/train.py`, `evaluate.py`, `export.py` and `publish.py` do."""
