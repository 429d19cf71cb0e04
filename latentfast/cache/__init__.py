"""latentfast.cache: tensors by what they were made from, in GPU memory, host memory and a folder that survives crashes.

Needs torch and the standard library. See `LatentCache`, and docs/cache.md.
"""

from latentfast.cache.cache import LatentCache
from latentfast.cache.digest import digest_module, digest_tensor
from latentfast.cache.disk import Verified
from latentfast.cache.environment import environment
from latentfast.cache.index import Entry
from latentfast.cache.key import Key
from latentfast.cache.nearest import Approximate
from latentfast.cache.stats import Stats, TierStats

__all__ = [
    "Approximate",
    "Entry",
    "Key",
    "LatentCache",
    "Stats",
    "TierStats",
    "Verified",
    "digest_module",
    "digest_tensor",
    "environment",
]
