"""The table of operations: each public operation in the forms that matter, with its inputs and its specification.

A stem has a file of its own here too.
"""

from tests.helpers import Target
from tests.operations.edit import EDITS
from tests.operations.guidance import GUIDANCE
from tests.operations.interpolate import INTERPOLATIONS
from tests.operations.mask import MASKS
from tests.operations.operation import Operation, Shape
from tests.operations.preview import PREVIEWS
from tests.operations.stats import STATISTICS
from tests.operations.temporal import LOSSES
from tests.operations.tiles import STITCHES

__all__ = ["BY_NAME", "LIGHT", "LOSSES", "OPERATIONS", "PER_SAMPLE", "Operation", "Shape", "large", "small"]

OPERATIONS = [*INTERPOLATIONS, *EDITS, *LOSSES, *STITCHES, *STATISTICS, *PREVIEWS, *MASKS, *GUIDANCE]
BY_NAME = {operation.name: operation for operation in OPERATIONS}
#: Those whose samples are independent of each other.
PER_SAMPLE = [operation for operation in OPERATIONS if operation.result_samples is not None]


#: Those that large shapes are for.
LIGHT = [operation for operation in OPERATIONS if not operation.heavy]


def small(target: Target) -> Shape:
    """A shape (B, C, T, H, W) for tests of logic: no power of two, an odd number of elements a sample."""
    return (2, 3, 5, 3, 7) if target.interpreted else (2, 3, 5, 7, 11)


def large(target: Target) -> Shape:
    """A shape whose samples span several blocks, chunks or threads of every kernel."""
    return (2, 4, 3, 18, 30) if target.interpreted else (2, 16, 5, 60, 52)
