"""`longext` and `python -m longext`."""

from longext.cli import app


def main() -> None:
    """Run the command line."""
    app(prog_name="longext")


if __name__ == "__main__":
    main()
