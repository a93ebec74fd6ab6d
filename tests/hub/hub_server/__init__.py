"""A small Hub for tests: a server of its own process that the real huggingface_hub client talks to over HTTP."""
