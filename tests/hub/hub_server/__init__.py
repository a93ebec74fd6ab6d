"""A small Hub for tests: a server process that the real huggingface_hub client uses over HTTP."""
