"""`python cli.py …` in a checkout does what the console script `kbne-edit …` does."""

from kbne_edit.commands import main

if __name__ == "__main__":
    main()
