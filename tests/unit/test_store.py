"""Which errors of the database pass by themselves."""

import psycopg
import pytest

from bridge.store import passes


@pytest.mark.parametrize(
    ("state", "passing"),
    [
        ("08006", True),  # connection failure
        ("25P03", True),  # the server ended an idle transaction
        ("25P04", True),  # or one that took too long
        ("40001", True),  # serialization failure
        ("40P01", True),  # deadlock
        ("53100", True),  # disk full
        ("55P03", True),  # lock not available
        ("57014", True),  # statement timeout
        ("57P01", True),  # session ended by an operator
        ("25006", False),  # read-only server
        ("42501", False),  # privilege missing
        ("42P01", False),  # table missing
        ("XX000", False),  # internal error
    ],
)
def test_by_sqlstate(state: str, passing: bool) -> None:  # noqa: FBT001 - a parameter of the test
    assert passes(psycopg.errors.lookup(state)()) is passing


def test_a_lost_connection_passes_and_an_error_of_ours_does_not() -> None:
    assert passes(psycopg.OperationalError("the connection is closed"))
    assert not passes(psycopg.ProgrammingError("a mistake"))
    assert not passes(ValueError("another"))
