"""The native CPU engine: C++17 behind a C interface (csrc/), its libraries (engine), and PyTorch operators."""
