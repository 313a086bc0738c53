"""Where the daemon's CPU time goes, from the bytes of the broker to its acknowledgements: in process, without I/O.

Network chunks of PUBLISH packets, as Mosquitto sends them, go through a connection without a network and the pipeline
into a sink that makes the bytes for COPY and throws them away. The best of several rounds, by turns.
"""

import argparse
import asyncio
import gc
import json
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from itertools import count, islice
from typing import NamedTuple, cast

import cbor2
import mqtt5
import numpy as np
import report
import uvloop
from store import TOPICS, Stream

from bridge import logs
from bridge.batch import Batch
from bridge.config import BatchLimits, Mqtt
from bridge.connection import READ_BYTES, Connection
from bridge.daemon import OBJECTS_BETWEEN_COLLECTIONS
from bridge.messages import CBOR, EPOCH, Limits, MeterReading, Reading
from bridge.pipeline import Pipeline
from bridge.store import Totals, copy_rows
from bridge.topics import Kind

CHUNK = 256_000  # what uvloop reads at once, in bytes
PACKET_IDS = 65_535
STEPS = {"codec": "codec", "decode": "decode, batch", "copy": "COPY bytes", "acknowledge": "PUBACK", "rest": "rest"}


class Form(NamedTuple):
    """How devices write: which of them, how many readings in a message, what a timestamp is."""

    name: str
    kinds: tuple[Kind, ...] = (Kind.METER, Kind.VEHICLE)
    readings: int = 1
    epoch: bool = False
    cbor: bool = False


FORMS = {
    "mixed": Form("JSON, half meters half vehicles"),
    "meters": Form("JSON from meters", (Kind.METER,)),
    "vehicles": Form("JSON from vehicles", (Kind.VEHICLE,)),
    "epoch": Form("JSON, epoch milliseconds", epoch=True),
    "cbor": Form("CBOR", cbor=True),
    "arrays": Form("JSON, arrays of 10", readings=10),
}


def copy_bytes(batch: Batch) -> int:
    """What the store sends for this batch, in bytes. The only place here that knows how."""
    return len(copy_rows(batch.meters.values())) + len(copy_rows(batch.vehicles.values()))


def recent(devices: int, messages: int) -> Stream:
    """A fleet whose messages, so many, are of the last hours: the bridge's clock is the true one."""
    minutes = 60 + 2 * messages // devices  # twice as many, where only meters send
    return Stream(devices, datetime.now(UTC) - timedelta(minutes=minutes))


def packets(stream: Stream, form: Form) -> Iterator[bytes]:
    """PUBLISH packets without end, in the order of the devices' minutes."""
    sizes = np.arange(form.readings) * stream.devices
    packet_ids = (number % PACKET_IDS + 1 for number in count())
    for base in count(0, form.readings * stream.devices):
        # Some at a time: Python objects of a million devices would show in the memory.
        for first in range(base, base + stream.devices, 1_000):
            last = min(first + 1_000, base + stream.devices)
            readings = stream.rows((np.arange(first, last)[:, None] + sizes).ravel()).readings()
            while said := list(islice(readings, form.readings)):
                kind = Kind.METER if isinstance(said[0], MeterReading) else Kind.VEHICLE
                if kind in form.kinds:
                    yield packet(form, TOPICS.telemetry(kind, said[0].device_id), said, next(packet_ids))


def packet(form: Form, topic: str, said: Sequence[Reading], packet_id: int) -> bytes:
    """One PUBLISH packet with these readings of a device."""
    bodies = [body(form, reading) for reading in said]
    value = bodies if form.readings > 1 else bodies[0]
    payload = cbor2.dumps(value) if form.cbor else json.dumps(value).encode()
    qos, content_type = mqtt5.QoS.AT_LEAST_ONCE, CBOR if form.cbor else None
    return mqtt5.PublishPacket(topic, payload, qos=qos, packet_id=packet_id, content_type=content_type).write()


def body(form: Form, reading: Reading) -> dict[str, object]:
    """A reading as the contract has it."""
    moment = EPOCH + timedelta(microseconds=reading.ts)
    written = moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
    timestamp: str | int = reading.ts // 1_000 if form.epoch else written
    if isinstance(reading, MeterReading):
        values: dict[str, object] = {"kwhConsumedAc": reading.kwh_ac, "voltage": reading.voltage}
        return {"meterId": reading.device_id, **values, "timestamp": timestamp}
    values = {"soc": reading.soc, "kwhDeliveredDc": reading.kwh_dc, "batteryTemp": reading.battery_temp}
    plug = {"meterId": reading.meter_id} if reading.meter_id else {}
    return {"vehicleId": reading.device_id, **values, "timestamp": timestamp, **plug}


def chunks(parts: Iterable[bytes]) -> Iterator[bytes]:
    """The same bytes as they come from the network: cut anywhere."""
    waiting = bytearray()
    for part in parts:
        waiting += part
        if len(waiting) >= CHUNK:
            yield bytes(waiting[:CHUNK])
            del waiting[:CHUNK]
    yield bytes(waiting)


class Stopwatch:
    """CPU time by step; within an inner step the outer one stands still."""

    def __init__(self) -> None:
        self.spent = dict.fromkeys((*STEPS, "load"), 0.0)
        self._step, self._since = "rest", time.process_time()

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        outer = self._turn_to(name)
        try:
            yield
        finally:
            self._turn_to(outer)

    def _turn_to(self, name: str) -> str:
        now = time.process_time()
        self.spent[self._step] += now - self._since
        self._since, before, self._step = now, self._step, name
        return before


class Sink:
    """Takes batches as the store does, as far as COPY."""

    def __init__(self, watch: Stopwatch) -> None:
        self._watch, self._totals = watch, Totals()
        self.bytes = 0

    async def open(self) -> Totals:
        return self._totals

    async def write(self, batch: Batch) -> Totals:
        assert not batch.dead_letters
        assert not batch.rivals
        with self._watch.step("copy"):
            self.bytes += copy_bytes(batch)
        received, stored = self._totals.received + batch.received, len(batch.meters) + len(batch.vehicles)
        self._totals = Totals(received=received, stored=self._totals.stored + stored)
        return self._totals


class Line:
    """Stands for the transport of a connection: counts what is written."""

    def __init__(self) -> None:
        self.written = 0

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.written += len(data)


class TimedConnection(Connection):
    """The daemon's connection; its acknowledgements are timed."""

    watch: Stopwatch

    def acknowledge(self, packet_ids: Sequence[int]) -> None:
        with self.watch.step("acknowledge"):
            super().acknowledge(packet_ids)


class Spent(NamedTuple):
    """CPU seconds by step, for so many messages."""

    messages: int
    readings: int
    bytes: int
    steps: dict[str, float]

    def microseconds(self, *steps: str) -> float:
        """A message, in these steps; without any in all."""
        return sum(self.steps[step] for step in steps or STEPS) / self.messages * 1e6


async def spend(stream: Stream, form: Form, messages: int) -> Spent:
    """Takes so many messages through the daemon."""
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS)
    watch, line, sizes = Stopwatch(), Line(), BatchLimits()
    sink = Sink(watch)
    window = max(PACKET_IDS, form.readings * CHUNK)
    pipeline = Pipeline(sink, TOPICS, Limits(), sizes, window, max_outstanding_bytes=1 << 30)

    def deliver(source: Connection, publications: Sequence[mqtt5.PublishPacket]) -> None:
        with watch.step("decode"):
            pipeline.receive(source, publications)

    mqtt = Mqtt()
    hello = mqtt5.ConnectPacket("bench", receive_max=mqtt.receive_maximum, max_packet_size=mqtt.max_packet_size)
    connection = TimedConnection(hello, deliver, lambda _: None)
    connection.watch = watch
    connection.connection_made(cast("asyncio.Transport", line))
    greeting, size = line.written, 0
    writer = asyncio.create_task(pipeline.run())
    load = chunks(islice(packets(stream, form), messages))
    while True:
        with watch.step("load"):
            chunk = next(load, None)
        if chunk is None:
            break
        size += len(chunk)
        with watch.step("codec"):
            for begin in range(0, len(chunk), READ_BYTES):
                deliver_bytes(connection, chunk[begin : begin + READ_BYTES])
        while pipeline.outstanding >= sizes.max_readings:  # noqa: ASYNC110 - all that is waited for is its turn
            await asyncio.sleep(0)
    pipeline.drain()
    await writer
    progress, readings = pipeline.progress, messages * form.readings
    assert progress.deliveries == messages
    assert progress.totals == Totals(received=readings, stored=readings), progress.totals
    assert sink.bytes > 40 * readings
    assert line.written - greeting >= 4 * messages
    assert not connection.closed.done()
    return Spent(messages, readings, size, watch.spent)


def deliver_bytes(connection: Connection, data: bytes) -> None:
    """As the event loop does: as much at a time as the connection has room for."""
    while data:
        room = connection.get_buffer(len(data))
        taken = min(len(data), len(room))
        room[:taken], data = data[:taken], data[taken:]
        connection.buffer_updated(taken)


def run(options: argparse.Namespace) -> dict[str, Spent]:
    """The best round of each form."""
    stream = recent(options.devices, options.messages)
    best: dict[str, Spent] = {}
    for number in range(1, options.rounds + 1):
        for name in options.forms:
            gc.collect()
            spent = uvloop.run(spend(stream, FORMS[name], options.messages // FORMS[name].readings))
            best[name] = min(best.get(name, spent), spent, key=Spent.microseconds)
        report.progress(f"round {number} of {options.rounds}")
    return best


def line(form: Form, spent: Spent) -> list[str]:
    return [
        form.name,
        f"{spent.bytes / spent.messages:.0f}",
        *(f"{spent.microseconds(step):.2f}" for step in STEPS),
        f"{spent.microseconds():.2f}",
        f"{spent.microseconds() * spent.messages / spent.readings:.2f}",
    ]


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    parser = report.arguments(__doc__, rounds=7)
    add = parser.add_argument
    add(
        "--forms", nargs="+", choices=FORMS, default=list(FORMS), metavar="NAME", help=f"only these: {', '.join(FORMS)}"
    )
    add("--devices", type=int, default=20_000, help="half meters, half vehicles")
    add("--messages", type=int, default=60_000, help="in a round of each form; of arrays, so many readings")
    return report.parse(parser, "decode", given, messages=10_000, devices=2_000)


def main() -> None:
    options = arguments()
    logs.configure("warning", "console")
    conditions = report.Conditions.now()
    found = run(options)
    header = ("µs of CPU a message", "bytes", *STEPS.values(), "all", "a reading")
    table = report.Table(header, [line(FORMS[name], spent) for name, spent in found.items()])
    note = (
        f"The best of {options.rounds} rounds of {options.messages:,} readings each, by turns, of {options.devices:,} "
        "devices. All in one process, without network and database. Bytes: the PUBLISH packet. Rest: the event loop "
        "and the pipeline's own work between batches."
    )
    report.publish("decode", [table], [note], conditions.describe(), options.write)


if __name__ == "__main__":
    main()
