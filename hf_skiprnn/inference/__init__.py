"""Inference beyond one forward call: sources for `model.pull`, classification of video files, and ONNX export."""
