"""Trains the embedded model ``latentfast.tiny`` from nothing; see ``python -m tools.train_tiny --help``."""
