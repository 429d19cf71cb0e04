"""Benchmarks against eager PyTorch, `torch.compile`, the peers and the machine's limits: see README.md here.

Imported as `latentfast.benchmarks`, from a wheel and in a checkout alike; run as `latentfast bench`.
"""
