"""Paths of folders in the checkout."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ROOT / "scripts"
CARDS = ROOT / "model_cards"
SHARED_DATA = ROOT.parent / "shared" / "data"  # real data sets beside the checkout
