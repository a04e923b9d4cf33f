"""The errors behind an error."""

from ppo_runtime.common.errors import chained


def test_each_is_given_once_though_one_may_be_its_own_cause() -> None:
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    for contexts in (True, False):
        assert list(chained(first, contexts=contexts)) == [first, second]
    assert list(chained(None, contexts=True)) == []


def test_what_was_being_handled_counts_where_it_is_asked_for() -> None:
    handled, raised = ValueError("handled"), ValueError("raised")
    raised.__context__ = handled
    assert list(chained(raised, contexts=True)) == [raised, handled]
    assert list(chained(raised, contexts=False)) == [raised]
