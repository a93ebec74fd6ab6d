"""Inference beyond one forward call: where pulled steps come from, videos read frame by frame, exported graphs."""
