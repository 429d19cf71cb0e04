"""``python -m latentfast``: the command line."""

import sys

from latentfast.cli import main

if __name__ == "__main__":
    sys.exit(main())
