"""``python -m moescale``."""

from moescale.cli import main

main()
