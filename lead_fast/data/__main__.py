"""`python -m lead_fast.data`: see prepare.py."""

from .prepare import main

main()
