"""`python -m blindtune`: the command line."""

from blindtune.cli import main

if __name__ == "__main__":  # a child process of `multiprocessing` imports this module too
    main()
