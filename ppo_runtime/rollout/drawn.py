"""Which responses ``generate`` returned lately, and whether they were sampled."""

from collections.abc import Iterable

from torch import Tensor

# Rows that are remembered: far more than a batch, and a few megabytes.
_MOST = 2**16


class Drawn:
    """Returned responses, looked up by their tokens: callers slice prompts off, sort rows and keep them for later."""

    def __init__(self) -> None:
        self._sampled: dict[int, bool] = {}

    def remember(self, responses: Iterable[Tensor], *, sampled: bool) -> None:
        """Note rows of tokens, without prompts; one that was sampled once counts as sampled."""
        for response in responses:
            row = _content(response)
            self._sampled[row] = self._sampled.pop(row, False) or sampled
            if len(self._sampled) > _MOST:
                del self._sampled[next(iter(self._sampled))]

    def returned(self, response: Tensor) -> bool:
        """Whether these tokens are one of the remembered rows."""
        return _content(response) in self._sampled

    def greedy(self, responses: Iterable[Tensor]) -> bool:
        """Whether all of these were returned, and one of them at least by greedy decoding alone."""
        found = [self._sampled.get(_content(response)) for response in responses]
        return None not in found and False in found


def _content(row: Tensor) -> int:
    return hash(tuple(row.tolist()))
