"""`python -m tl_crosscoder`, where no script is on the path."""

import sys

from tl_crosscoder.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
