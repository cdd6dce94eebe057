"""`longext` and `python -m longext`."""

from longext.cli import app
from longext.training.launcher import follow_launcher


def main() -> None:
    """Run the command line."""
    follow_launcher()
    app(prog_name="longext")


if __name__ == "__main__":
    main()
