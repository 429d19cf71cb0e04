"""Triton kernels and their launchers, a module a stem: `latentfast._operators` looks them up by stem and name."""
