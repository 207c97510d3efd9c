"""`python -m flopeq` is the command `flopeq`."""

from flopeq.cli import main

if __name__ == "__main__":
    main()
