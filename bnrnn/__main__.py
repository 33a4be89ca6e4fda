"""Run the command with `python -m bnrnn`."""

from bnrnn.command.cli import main

if __name__ == "__main__":
    main()
