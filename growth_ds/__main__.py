"""`python -m growth_ds` is `growth-ds`."""

from growth_ds.cli import main

if __name__ == "__main__":
    main()
