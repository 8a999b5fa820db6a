"""The `re2tal` command: parse, build, call."""


def main() -> None:
    """Entry point of the `re2tal` command."""
