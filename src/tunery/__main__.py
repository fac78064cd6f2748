"""`python -m tunery`, which is also what torchrun starts."""

from tunery.cli import main

if __name__ == "__main__":
    main()
