"""The Triton kernels, which live in the repository's top-level folder `kernels/`.

An installed wheel has them as `latentfast.kernels.triton`. In a checkout (editable install, or run from its root)
they are found by this path extension. The top-level folder has no `__init__.py`: the package index has a package of
that name.
"""

from pathlib import Path

_checkout = Path(__file__).resolve().parents[2] / "kernels"
if _checkout.is_dir():
    __path__.append(str(_checkout))
