"""`kvstrata bench quantize`, as a file of this folder."""

import sys

from kvstrata.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "quantize", *sys.argv[1:]]))
