"""Benchmarks against eager PyTorch, `torch.compile` and the memory limit: see README.md in this folder."""
