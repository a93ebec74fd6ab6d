"""What the commands `hf-skiprnn train`, `evaluate`, `export` and `publish` do; hf_skiprnn_cli.py calls them."""
