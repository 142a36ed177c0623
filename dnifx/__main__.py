"""``python -m dnifx`` is the command ``dnifx``."""

from dnifx.cli import main

if __name__ == "__main__":
    main()
