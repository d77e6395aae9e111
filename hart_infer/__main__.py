"""`python -m hart_infer` is `hart-infer`."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
