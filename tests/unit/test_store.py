"""Which errors of the database pass by themselves; what is said about a DSN that is wrong."""

import psycopg
import pytest
from pydantic import SecretStr

from bridge.config import Database
from bridge.errors import ConfigError
from bridge.store import conninfo, passes


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


@pytest.mark.parametrize("password", ["hunter@2", "hunter/2", "@hunter2", "hunter2/", "h@unter/2", "x?a@hunter2"])
def test_a_password_that_would_be_taken_for_a_host_is_not_shown(password: str) -> None:
    with pytest.raises(ConfigError, match="%40") as refused:
        conninfo(Database(dsn=SecretStr(f"postgresql://user:{password}@db.example:5432/energy?sslmode=require")))
    assert "hunter" not in str(refused.value)


@pytest.mark.parametrize(
    "dsn",
    [
        "postgresql://user:hunter%402@db.example/energy",
        "postgresql://user@%2Fvar%2Frun%2Fpostgresql/energy",
        "postgresql:///energy?host=/var/run/postgresql&passfile=/home/me@there/pgpass",
        "postgresql://user%40tenant@[::1],db2.example:5433/energy",
        "postgresql://db1.example,db2.example:5433/energy?target_session_attrs=read-write",
        "postgresql:///energy?options=-csearch_path%3Denergy",
        "host=/var/run/postgresql user=me@there password=hunter@2/x",
        "host=db.example dbname=energy password='a://b/c@d'",
        "",
    ],
)
def test_a_dsn_that_is_right_is_taken(dsn: str) -> None:
    assert "application_name=wattbridge" in conninfo(Database(dsn=SecretStr(dsn)))
