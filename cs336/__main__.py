import sys

from cs336.cli import main

if __name__ == "__main__":
    sys.exit(main())
