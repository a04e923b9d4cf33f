"""Every test of the runtime: what transformers announces in its log as going away is an error, as its warnings are."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


class _Announcements(logging.Handler):
    """Raises on a deprecation: transformers logs some of them where Python would warn, and only once."""

    def emit(self, record: logging.LogRecord) -> None:
        if "deprecated" in record.getMessage().lower():
            raise AssertionError(f"transformers announces: {record.getMessage()}")


@pytest.fixture(autouse=True)
def deprecations_are_errors() -> Iterator[None]:
    logger, handler = logging.getLogger("transformers"), _Announcements(logging.WARNING)
    logger.addHandler(handler)
    yield
    logger.removeHandler(handler)
