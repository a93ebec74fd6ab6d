"""The GPU engine in Triton: operators, host code around the kernels (passes), and the kernels."""
