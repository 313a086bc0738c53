"""The services and the daemon of the integration tests, for tests of what operators ask."""

from tests.integration.conftest import broker, daemon, database, devices, postgres_dsn_admin, template

__all__ = ["broker", "daemon", "database", "devices", "postgres_dsn_admin", "template"]
