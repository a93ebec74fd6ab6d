"""The code that is copied into every checkpoint: a flat folder of modules in plain PyTorch."""
