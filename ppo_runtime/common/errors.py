"""What an error came of."""

from collections.abc import Iterator


def chained(error: BaseException | None, *, contexts: bool) -> Iterator[BaseException]:
    """An error, what it was raised from, and so on; each once, since one may be its own cause.

    Args:
        error: the last one; None gives nothing.
        contexts: go on with what was being handled where an error was raised from none.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        yield error
        seen.add(id(error))
        error = error.__cause__ or (error.__context__ if contexts else None)
