"""The eager backend, a module a stem: the private operators' signatures in front of `latentfast.reference`."""
