"""`python -m keymap` is the command `keymap`."""

import sys

from keymap.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
