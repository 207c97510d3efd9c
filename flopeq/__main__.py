"""Runs the command `flopeq` as `python -m flopeq`."""

from flopeq.cli.app import main

if __name__ == "__main__":
    main()
