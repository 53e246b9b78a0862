"""`python -m optimum_slim`: the same commands as `optimum-cli slim`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main())
