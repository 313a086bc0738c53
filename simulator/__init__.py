"""A fleet of meters and vehicles that publishes energy telemetry over MQTT 5, and knows what must become of it.

`fleet` says what the devices measure and `faults` what goes wrong on the way to the broker, both without I/O;
`ledger` writes down what must become of every message and `truth` reads it again; `publisher` brings messages to
a broker through a few connections, `devices` through one per device, and both keep what was not acknowledged;
`run` sets the pace; `cli` is the command. Nothing here imports the bridge, so that the same fleet can test any
other bridge.
"""
