"""`python -m trellis` is `trellis`."""

from .cli import main

main()
