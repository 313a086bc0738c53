"""A fleet of meters and vehicles that publishes energy telemetry over MQTT 5.

`fleet` knows what the devices measure and does no I/O; `publisher` brings messages to a broker and keeps
what was not acknowledged; `run` sets the pace; `cli` is the command. Nothing here imports the bridge, so
that the same fleet can test any other bridge.
"""
