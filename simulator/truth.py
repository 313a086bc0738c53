"""What a ledger says must be in the database: history rows and dead letters, as columns.

History follows from the order of the stream: of the readings of one (device, timestamp) that reached the broker
the first is stored, later ones with the same values are duplicates, others conflicts.
"""

import base64
import json
import mmap
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from simulator.ledger import LedgerError, Outcome, read_acks, read_header
from simulator.messages import BODY_BYTES, SLOT_BYTES, Encoder, Fate, Reading, SlotType

_NO_ANSWER = 0

_YEAR_10000_MS = 253_402_300_800_000

_SLOT = np.dtype(
    {
        "names": [
            "message",
            "device",
            "ts",
            "energy",
            "level",
            "temperature",
            "meter",
            "fate",
            "type",
            "length",
            "count",
        ],
        "formats": ["<u4", "<u4", "<i8", "<i4", "<u2", "<i2", "<u4", "u1", "u1", "<u4", "<u4"],
        "offsets": [0, 4, 8, 16, 20, 22, 24, 28, 31, 8, 0],
        "itemsize": SLOT_BYTES,
    }
)
"""A slot of any type: "length" is of a LETTER, "count" of END."""

_VALUES = ("energy", "level", "temperature", "meter")

Slots = npt.NDArray[np.void]
Int64s = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]


class Rows(NamedTuple):
    """Rows of history as columns, in order of (device, ts), of which there is one row each."""

    device: npt.NDArray[np.int32]
    """Number of the device, as in `Reading`: first the meters, then the vehicles."""
    ts: Int64s
    """Microseconds since 1970."""
    energy: Int64s
    """Ticks of 0.1 Wh."""
    level: Int64s
    """0.1 V of a meter, 0.01 % of a vehicle."""
    temperature: Int64s
    """0.1 °C; 0 for a meter."""
    meter: Int64s
    """Number of the meter that a vehicle names plus 1; 0 for none, and for a meter."""
    certain: Bools
    """False where the simulator was killed before the broker answered: the row may be there or not, and if another
    reading of the same (device, ts) was sent, the row may have the values of that one."""

    def part(self, places: slice | Bools) -> "Rows":
        """Return some of the rows."""
        return Rows(
            self.device[places],
            self.ts[places],
            self.energy[places],
            self.level[places],
            self.temperature[places],
            self.meter[places],
            self.certain[places],
        )


class Letter(NamedTuple):
    """One dead letter."""

    device_id: str
    """Empty where the topic names no device of the fleet."""
    topic: str
    reason: str
    payload: bytes
    part: bool
    """The payload is a JSON value within what was sent, so that a bridge may write it in its own way."""
    certain: bool
    """False: it may be there or not, as for a row."""
    number: int
    """The first message that says it."""


class Books(NamedTuple):
    """The ledger in numbers.

    Messages: all, and those that the broker did not answer, refused, or took though nobody is subscribed. Of what
    the messages say that were not refused: readings; and for each reading and each part that breaks the contract
    one of stored, duplicates, conflicts and rejected. What becomes the same dead letter again is a duplicate.
    """

    messages: int
    readings: int
    stored: int
    duplicates: int
    conflicts: int
    rejected: int
    in_doubt: int
    refused: int
    unheard: int


class Truth(NamedTuple):
    """What must be in the database after the run of a ledger."""

    header: dict[str, Any]
    ids: list[str]
    """Of all devices, by number."""
    meters: int
    """How many of the devices are meters."""
    books: Books
    complete: bool
    """The broker answered every message."""
    meter_rows: Rows
    vehicle_rows: Rows
    letters: list[Letter]
    """All different in (topic, reason, payload), in order of message."""


def read(path: Path) -> Truth:
    """Return what the ledger at `path` says must be in the database. Raises LedgerError."""
    # Acknowledgements first: of a run that goes on, the ledger may then be ahead of them, but never behind.
    acks = read_acks(path)
    content = _map(path)
    header, start = read_header(path, content)
    encoder = _encoder(path, header)
    slots, messages, ended = _entries(path, content, start)
    outcomes = _outcomes(path, acks, messages, ended=ended)
    certain = outcomes != _NO_ANSWER
    delivered = outcomes != Outcome.REFUSED

    readings = _sorted_readings(path, slots, encoder)
    _check_fates(path, readings)
    if not delivered.all():
        readings = readings[delivered[readings["message"]]]
    rows, conflicts = _resolve(readings, certain, encoder)
    rejected, repeated = _read_rejected(path, slots, outcomes, encoder)
    split = int(np.searchsorted(rows.device, encoder.meters))
    books = Books(
        messages=messages,
        readings=len(readings),
        stored=len(rows.ts),
        duplicates=len(readings) - len(rows.ts) - len(conflicts) + repeated,
        conflicts=len(conflicts),
        rejected=len(rejected),
        in_doubt=int(np.count_nonzero(~certain)),
        refused=int(np.count_nonzero(~delivered)),
        unheard=int(np.count_nonzero(outcomes == Outcome.UNHEARD)),
    )
    return Truth(
        header=header,
        ids=encoder.ids,
        meters=encoder.meters,
        books=books,
        complete=not books.in_doubt,
        meter_rows=rows.part(slice(None, split)),
        vehicle_rows=rows.part(slice(split, None)),
        letters=sorted([*rejected, *conflicts], key=lambda letter: letter.number),
    )


def _map(path: Path) -> mmap.mmap:
    """Return the content of the file without reading it yet. Raises LedgerError."""
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise LedgerError(f"there is no ledger {path}") from error
    except OSError as error:
        raise LedgerError(f"the ledger {path} cannot be read ({error.strerror})") from error
    except ValueError as error:  # what mmap says of no bytes, and open of a zero in the name
        raise LedgerError(f"{path} is empty or no name of a file: it is no ledger") from error


def _encoder(path: Path, header: dict[str, Any]) -> Encoder:
    meters, vehicles, root = header.get("meter_ids"), header.get("vehicle_ids"), header.get("topic_root")
    if not isinstance(meters, list) or not isinstance(vehicles, list) or not isinstance(root, str):
        raise _damaged(path, "its header does not say which devices there are")
    if not root.isprintable() or not all(isinstance(name, str) and name.isascii() for name in (*meters, *vehicles)):
        raise _damaged(path, "its header has a name that is none")
    return Encoder(meters, vehicles, root)


def _entries(path: Path, content: mmap.mmap, start: int) -> tuple[Slots, int, bool]:
    """Return the slots of the messages, without a torn tail, how many messages, and whether there is an END."""
    slots = np.frombuffer(content, _SLOT, len(content) // SLOT_BYTES)[start:]
    types = np.ascontiguousarray(slots["type"])
    counts = np.bincount(types, minlength=256)
    if counts.sum() != counts[[SlotType.READING, SlotType.LETTER, SlotType.BODY, SlotType.END]].sum():
        raise _damaged(path, "it has a slot of no known type")
    ended = bool(counts[SlotType.END])
    if ended and (types[-1] != SlotType.END or counts[SlotType.END] != 1 or len(content) % SLOT_BYTES):
        raise _damaged(path, "it goes on after its end")
    end = len(slots) - ended

    letters, bodies = np.flatnonzero(types == SlotType.LETTER), np.flatnonzero(types == SlotType.BODY)
    sizes = _body_slots(slots["length"][letters])
    if (
        not ended
        and len(letters)
        and letters[-1] + sizes[-1] >= end
        and np.all(types[letters[-1] + 1 :] == SlotType.BODY)
    ):
        end = int(letters[-1])  # the last letter is torn
        letters, sizes, bodies = letters[:-1], sizes[:-1], bodies[bodies < end]
    if sizes.sum() != len(bodies) or not np.array_equal(_ranges(letters + 1, sizes), bodies):
        raise _damaged(path, "a letter in it is longer or shorter than it says")

    numbers = slots["message"][:end][types[:end] != SlotType.BODY]
    if len(numbers) and (numbers[0] or np.diff(numbers).max(initial=0) > 1):
        raise _damaged(path, "messages are missing in it")
    messages = int(numbers[-1]) + 1 if len(numbers) else 0
    if ended and slots["count"][-1] != messages:
        raise _damaged(path, "its end counts other messages than it has")
    return slots[:end], messages, ended


def _outcomes(path: Path, acks: bytes | None, messages: int, *, ended: bool) -> npt.NDArray[np.uint8]:
    """Return the answer of the broker to each message."""
    if acks is None:
        if not ended:
            raise LedgerError(
                f"{path} has no end, and {path}.acks is missing: without it nobody knows what was delivered; "
                "put it back beside the ledger"
            )
        return np.full(messages, Outcome.ACKNOWLEDGED, np.uint8)
    outcomes = np.frombuffer(acks, np.uint8)
    if outcomes[messages:].any() or outcomes.max(initial=0) > max(Outcome):
        raise LedgerError(f"{path}.acks does not belong to {path}: it has answers to other messages")
    outcomes = outcomes[:messages]
    # A map that was not grown yet: nothing was sent since.
    outcomes = np.pad(outcomes, (0, messages - len(outcomes)))
    if ended and not np.isin(outcomes, (Outcome.ACKNOWLEDGED, Outcome.UNHEARD)).all():
        raise _contradiction(path, "its end says that all was acknowledged, its acknowledgements do not")
    return outcomes


def _sorted_readings(path: Path, slots: Slots, encoder: Encoder) -> Slots:
    """Return the readings in order of (device, ts, place in the stream). Raises LedgerError on impossible ones."""
    places = np.flatnonzero(slots["type"] == SlotType.READING)
    device, ts = slots["device"][places].astype(np.int64), slots["ts"][places]
    if not len(places):
        return slots[:0]
    if (
        device.max() >= len(encoder.ids)
        or slots["meter"][places].max() > encoder.meters
        or ts.min() < 0
        or ts.max() >= _YEAR_10000_MS
    ):
        raise _damaged(path, "it has a reading of a device or a time that there is not")
    span = int(ts.max() - ts.min()) + 1
    if len(encoder.ids) * span < 2**63:
        order = np.argsort(device * span + (ts - ts.min()), kind="stable")
    else:
        order = np.lexsort((ts, device))
    # Whole slots as plain bytes: copying them field by field takes longer.
    plain = slots.view(np.dtype((np.void, SLOT_BYTES)))
    return plain[places[order]].view(_SLOT)


class _Groups(NamedTuple):
    """Sorted readings by (device, ts)."""

    firsts: Int64s
    """Where each group begins."""
    later: Int64s
    """All others."""
    same: Bools
    """Of each later one: it has the values of the first of its group."""


def _group(readings: Slots) -> _Groups:
    if not len(readings):
        return _Groups(*(np.empty(0, np.int64),) * 2, np.empty(0, np.bool_))
    begins = np.ones(len(readings), np.bool_)
    device, ts = readings["device"], readings["ts"]
    begins[1:] = (device[1:] != device[:-1]) | (ts[1:] != ts[:-1])
    firsts, later = np.flatnonzero(begins), np.flatnonzero(~begins)
    first = firsts[np.searchsorted(firsts, later) - 1]
    same = np.ones(len(later), np.bool_)
    for name in _VALUES:
        column = readings[name]
        same &= column[later] == column[first]
    return _Groups(firsts, later, same)


def _check_fates(path: Path, readings: Slots) -> None:
    """Raise LedgerError where a fate that was written is not what follows from the order of the stream."""
    firsts, later, same = _group(readings)
    fates = readings["fate"]
    rivals = later[~same]
    repeated = rivals[fates[rivals] == Fate.DUPLICATE]  # right where the same conflict was sent before
    fine = (
        (fates[firsts] == Fate.STORED).all()
        and (fates[later[same]] == Fate.DUPLICATE).all()
        and np.isin(fates[rivals], (Fate.CONFLICT, Fate.DUPLICATE)).all()
        and all(_said_before(readings, int(place)) for place in repeated)
    )
    if not fine:
        raise _contradiction(path, "the fate of a reading is not what follows from those before it")


def _said_before(readings: Slots, place: int) -> bool:
    """Return whether an earlier reading of the same (device, ts) has the values of the one at `place`."""
    key, values = readings[["device", "ts"]], readings[list(_VALUES)]
    before = place - 1
    while before >= 0 and key[before] == key[place]:
        if values[before] == values[place]:
            return True
        before -= 1
    return False


def _resolve(readings: Slots, certain: Bools, encoder: Encoder) -> tuple[Rows, list[Letter]]:
    """Return what history and which conflicts follow from sorted readings; `certain` is by message."""
    firsts, later, same = _group(readings)
    sure = certain[readings["message"]]
    row_sure = np.logical_or.reduceat(sure, firsts) if len(firsts) else sure
    letters: list[Letter] = []
    for group in np.unique(np.searchsorted(firsts, later[~same]) - 1).tolist():
        members = slice(firsts[group], firsts[group + 1] if group + 1 < len(firsts) else None)
        row_sure[group], rivals = _settle_conflict(readings[members], sure[members], encoder)
        letters += rivals
    stored = readings[firsts]
    rows = Rows(
        stored["device"].astype(np.int32),
        stored["ts"] * 1000,
        stored["energy"].astype(np.int64),
        stored["level"].astype(np.int64),
        stored["temperature"].astype(np.int64),
        stored["meter"].astype(np.int64),
        row_sure,
    )
    return rows, letters


def _settle_conflict(group: Slots, sure: Bools, encoder: Encoder) -> tuple[bool, list[Letter]]:
    """Return whether the first of several readings of one (device, ts) is certainly stored, and who conflicts.

    In history can be whatever comes before anything that certainly came, or is it. Of a message with several
    readings only the first one counts for that.
    """
    values = group[list(_VALUES)].tolist()
    messages = group["message"].tolist()
    stored_at = int(sure.argmax()) if sure.any() else len(values) - 1
    candidates = [at for at in range(stored_at + 1) if not at or messages[at] != messages[at - 1]]
    letters: dict[tuple[int, ...], Letter] = {}
    for at, value in enumerate(values):
        if not any(values[other] != value for other in candidates if other < at):
            continue
        known = letters.get(value)
        certain = bool(sure[at]) and all(values[other] != value for other in candidates)
        if known is None:
            letters[value] = _conflict(group[at], encoder, certain=certain)
        elif certain and not known.certain:
            letters[value] = known._replace(certain=True)
    return bool(sure.any()) and all(values[at] == values[0] for at in candidates), list(letters.values())


def _conflict(slot: np.void, encoder: Encoder, *, certain: bool) -> Letter:
    message, device, ts, *values = slot[["message", "device", "ts", *_VALUES]].item()
    payload = encoder.payload(Reading(0, device, ts, *values))
    return Letter(
        encoder.ids[device], encoder.topics[device], "conflict", payload, part=True, certain=certain, number=message
    )


def _read_rejected(
    path: Path, slots: Slots, outcomes: npt.NDArray[np.uint8], encoder: Encoder
) -> tuple[list[Letter], int]:
    """Return the dead letters for what breaks the contract, and how often one was sent again."""
    letters: dict[tuple[str, str, bytes], Letter] = {}
    known: set[tuple[str, str, bytes]] = set()
    sent = 0
    text = slots.view(np.uint8).reshape(-1, SLOT_BYTES)[:, :BODY_BYTES]
    for place in np.flatnonzero(slots["type"] == SlotType.LETTER).tolist():
        slot = slots[place]
        length, number, device = int(slot["length"]), int(slot["message"]), int(slot["device"])
        body = text[place + 1 : place + 1 + -(-length // BODY_BYTES)].tobytes()[:length]
        topic, reason, payload, part = _read_body(path, body)
        key = topic, reason, payload
        if slot["fate"] != (Fate.DUPLICATE if key in known else Fate.REJECTED):
            raise _contradiction(path, "the fate of a dead letter is not what follows from those before it")
        known.add(key)
        if outcomes[number] == Outcome.REFUSED:
            continue
        sent += 1
        certain = bool(outcomes[number] != _NO_ANSWER)
        if key not in letters:
            name = encoder.ids[device] if device < len(encoder.ids) else ""
            letters[key] = Letter(name, topic, reason, payload, part, certain, number)
        elif certain and not letters[key].certain:
            letters[key] = letters[key]._replace(certain=True)
    return list(letters.values()), sent - len(letters)


def _read_body(path: Path, body: bytes) -> tuple[str, str, bytes, bool]:
    try:
        said = json.loads(body)
        return (
            str(said["topic"]),
            str(said["reason"]),
            base64.b64decode(said["payload"], validate=True),
            bool(said["part"]),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, "a letter in it cannot be read") from error


def _body_slots(lengths: npt.NDArray[np.uint32]) -> Int64s:
    return (lengths.astype(np.int64) + BODY_BYTES - 1) // BODY_BYTES


def _ranges(starts: Int64s, sizes: Int64s) -> Int64s:
    """Return start, start + 1, … of each range, `sizes` of them, one after the other."""
    return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())


def _damaged(path: Path, what: str) -> LedgerError:
    return LedgerError(f"the ledger {path} is damaged: {what}")


def _contradiction(path: Path, what: str) -> LedgerError:
    return LedgerError(f"the ledger {path} contradicts itself, which is a bug of the simulator: {what}")
