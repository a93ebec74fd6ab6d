"""What travels with every checkpoint: flat files in plain PyTorch, side by side."""
