"""`python -m blindtune`: the command line."""

from blindtune.cli import main

main()
