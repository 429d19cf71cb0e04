"""The public operations, a module a stem: validation, docstrings, autograd, then one operator call."""
