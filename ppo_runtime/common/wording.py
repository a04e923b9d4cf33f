"""Words for numbers."""


def counted(number: int, noun: str) -> str:
    """A number and its noun: "1 step", "2 steps"."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
