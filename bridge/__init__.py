"""Wattbridge: energy telemetry from MQTT into PostgreSQL, acknowledged after commit."""

__version__ = "0.1.0"
