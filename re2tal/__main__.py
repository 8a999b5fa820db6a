"""`python -m re2tal`: the `re2tal` command where it is not on the path."""

from re2tal.cli import main

main()
