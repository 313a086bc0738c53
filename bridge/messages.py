"""Messages: from payload bytes to readings, or the reason why not. Pure: no I/O, no clock.

Times are integers here: microseconds since 1970-01-01 UTC, the resolution of PostgreSQL's timestamptz.
"""

import json
import re
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from functools import cached_property
from io import BytesIO
from typing import Annotated, Any, NamedTuple, NoReturn, NotRequired

import cbor2
import msgspec
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, model_validator, with_config
from pydantic_core import from_json
from typing_extensions import TypedDict

from bridge.errors import Reason, Rejection
from bridge.topics import Kind, is_device_id

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
SECOND = 1_000_000
DAY = 86_400 * SECOND
# Numbers from here on are milliseconds: as seconds they would lie beyond the year 5138.
FIRST_MILLISECONDS = 100_000_000_000
MOST_MILLISECONDS = 10**15
RFC3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})?"
)
# The messages that nearly all are: see decode_usual.
USUAL_BYTES = 400
USUAL_TIMESTAMP = len("2026-02-10T14:47:24.841Z")
CBOR = "application/cbor"
STATUS = {b"online": True, b"offline": False}


class Limits(BaseModel):
    """What a reading may say; beyond it is a fault of the device, and a dead letter."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    horizon_days: int = Field(366, ge=1, le=36_600, description="readings older than this many days are dead letters")
    max_future_s: float = Field(300, ge=0, le=86_400, description="seconds a device clock may run ahead")
    max_array: int = Field(10_000, ge=1, le=100_000, description="most readings in one message")
    max_interval_kwh: float = Field(1_000, gt=0, le=1e9, description="most energy in one interval, kWh")
    max_voltage: float = Field(1_000, gt=0, le=1e9, description="highest voltage, V")
    min_battery_temp: float = Field(-60, ge=-274, description="lowest battery temperature, degrees Celsius")
    max_battery_temp: float = Field(150, le=10_000, description="highest battery temperature, degrees Celsius")

    @model_validator(mode="after")
    def _leave_room(self) -> "Limits":
        if not self.min_battery_temp < self.max_battery_temp:
            raise ValueError("min_battery_temp must be below max_battery_temp")
        return self

    @cached_property
    def bounds(self) -> "Bounds":
        """The same where it is asked for each reading."""
        return Bounds(
            self.max_interval_kwh,
            self.max_voltage,
            self.min_battery_temp,
            self.max_battery_temp,
            round(self.max_future_s * SECOND),
            self.horizon_days * DAY,
        )


class Bounds(NamedTuple):
    """What a reading may say at most and at least; times in microseconds, from the arrival."""

    kwh: float
    voltage: float
    coldest: float
    hottest: float
    future: int
    past: int


class MeterReading(NamedTuple):
    """One interval of a meter: AC energy in kWh since the previous reading, voltage in V."""

    device_id: str
    ts: int
    kwh_ac: float
    voltage: float
    received_at: int
    ts_from_arrival: bool

    @property
    def values(self) -> tuple[float, float]:
        """What makes two readings of one (device, ts) the same."""
        return self.kwh_ac, self.voltage


class VehicleReading(NamedTuple):
    """One interval of a vehicle: DC energy in kWh since the previous reading, SoC in percent, temperature in °C."""

    device_id: str
    ts: int
    kwh_dc: float
    soc: float
    battery_temp: float
    meter_id: str | None
    received_at: int
    ts_from_arrival: bool

    @property
    def values(self) -> tuple[float, float, float, str | None]:
        """What makes two readings of one (device, ts) the same."""
        return self.kwh_dc, self.soc, self.battery_temp, self.meter_id


Reading = MeterReading | VehicleReading


class Presence(NamedTuple):
    """What a device said on its status topic."""

    device_id: str
    kind: Kind
    online: bool
    received_at: int


# Strict: no number in a string is taken, no boolean as a number. Unknown fields are ignored. The field names are the
# accepted snake_case spellings, the aliases the contract's own. (Dictionaries and not models: half the time.)
# docs/asyncapi.py makes the schemas of the contract from them.
_CONFIG = ConfigDict(strict=True, validate_by_name=True, allow_inf_nan=False)
_Energy = Annotated[float, Field(ge=0)]
_Timestamp = Annotated[
    Any,
    Field(
        description="When the interval ended: RFC 3339 with a zone, or epoch seconds or milliseconds. "
        "Absent or null: the time of arrival."
    ),
]


@with_config(_CONFIG)
class MeterPayload(TypedDict):
    """What a meter says of one interval."""

    meter_id: NotRequired[
        Annotated[str | None, Field(alias="meterId", description="The meter itself, as in the topic.")]
    ]
    kwh_consumed_ac: Annotated[
        _Energy, Field(alias="kwhConsumedAc", description="AC energy since the previous reading, kWh.")
    ]
    voltage: Annotated[float, Field(ge=0, description="Voltage, V.")]
    timestamp: NotRequired[_Timestamp]


@with_config(_CONFIG)
class VehiclePayload(TypedDict):
    """What a vehicle says of one interval."""

    vehicle_id: NotRequired[
        Annotated[str | None, Field(alias="vehicleId", description="The vehicle itself, as in the topic.")]
    ]
    soc: Annotated[float, Field(ge=0, le=100, description="State of charge, percent.")]
    kwh_delivered_dc: Annotated[
        _Energy, Field(alias="kwhDeliveredDc", description="DC energy since the previous reading, kWh.")
    ]
    battery_temp: Annotated[float, Field(alias="batteryTemp", description="Battery temperature, degrees Celsius.")]
    meter_id: NotRequired[
        Annotated[str | None, Field(alias="meterId", description="The meter of the charger it is plugged into.")]
    ]
    timestamp: NotRequired[_Timestamp]


# How nearly all payloads say it. A name with _ at its end is the other spelling.
class _UsualMeter(msgspec.Struct, rename="camel", gc=False):
    kwh_consumed_ac: Annotated[float, msgspec.Meta(ge=0)]
    voltage: Annotated[float, msgspec.Meta(ge=0)]
    timestamp: str | int | float
    meter_id: str | None = None
    meter_id_: Any = msgspec.field(name="meter_id", default=msgspec.UNSET)


class _UsualVehicle(msgspec.Struct, rename="camel", gc=False):
    soc: Annotated[float, msgspec.Meta(ge=0, le=100)]
    kwh_delivered_dc: Annotated[float, msgspec.Meta(ge=0)]
    battery_temp: float
    timestamp: str | int | float
    vehicle_id: str | None = None
    vehicle_id_: Any = msgspec.field(name="vehicle_id", default=msgspec.UNSET)
    meter_id: str | None = None
    meter_id_: Any = msgspec.field(name="meter_id", default=msgspec.UNSET)


_METER = TypeAdapter(MeterPayload).validator
_VEHICLE = TypeAdapter(VehiclePayload).validator
_USUAL_METER = msgspec.json.Decoder(_UsualMeter).decode
_USUAL_VEHICLE = msgspec.json.Decoder(_UsualVehicle).decode
# A NamedTuple without its own constructor: half the time.
_new = tuple.__new__


def decode_usual(kind: Kind, device_id: str, payload: bytes, arrival: int, limits: Limits) -> Reading | None:
    """The reading of a JSON message as nearly all are, in a fraction of the time; None where it is another.

    What this takes `decode_telemetry` takes as well, and says the same. It is of one piece, as it is done for each
    message. It has to see for itself what msgspec does not in a field that it skips: text that is no UTF-8, and values
    within values within values.
    """
    if len(payload) > USUAL_BYTES or not payload.isascii():
        return None
    bounds = limits.bounds
    try:
        if kind is Kind.METER:
            meter = _USUAL_METER(payload)
            ts = _usual_microseconds(meter.timestamp)
            if (
                (meter.meter_id is None or meter.meter_id == device_id)
                and meter.kwh_consumed_ac <= bounds.kwh
                and meter.voltage <= bounds.voltage
                and -bounds.past <= ts - arrival <= bounds.future
                and meter.meter_id_ is msgspec.UNSET
            ):
                return _new(MeterReading, (device_id, ts, meter.kwh_consumed_ac, meter.voltage, arrival, False))
            return None
        vehicle = _USUAL_VEHICLE(payload)
        meter_id = vehicle.meter_id
        ts = _usual_microseconds(vehicle.timestamp)
        if (
            (vehicle.vehicle_id is None or vehicle.vehicle_id == device_id)
            and vehicle.kwh_delivered_dc <= bounds.kwh
            and bounds.coldest <= vehicle.battery_temp <= bounds.hottest
            and (meter_id is None or is_device_id(meter_id))
            and -bounds.past <= ts - arrival <= bounds.future
            and vehicle.vehicle_id_ is vehicle.meter_id_ is msgspec.UNSET
        ):
            kwh_dc, soc, battery_temp = vehicle.kwh_delivered_dc, vehicle.soc, vehicle.battery_temp
            return _new(VehicleReading, (device_id, ts, kwh_dc, soc, battery_temp, meter_id, arrival, False))
    except (msgspec.MsgspecError, ValueError, Rejection):
        pass
    return None


def decode_telemetry(
    kind: Kind, device_id: str, payload: bytes, content_type: str | None, arrival: int, limits: Limits
) -> Sequence[Reading | Rejection]:
    """The readings of one telemetry message, in its order; an element of an array that is rejected is in its place.

    `arrival` is in microseconds since 1970. Raises Rejection where the message as a whole says nothing.
    """
    is_cbor = content_type is not None and content_type.lower() == CBOR
    try:
        if is_cbor:
            parsed = _parse_cbor(payload)
        elif payload.lstrip()[:1] == b"[":
            parsed = from_json(payload)
        else:
            validate = _METER.validate_json if kind is Kind.METER else _VEHICLE.validate_json
            return (_reading(kind, device_id, validate(payload), arrival, limits),)
        if not isinstance(parsed, list):
            return (_reading(kind, device_id, _validate(kind, parsed), arrival, limits),)
    except ValidationError as error:
        raise _rejection(error) from None
    except (ValueError, cbor2.CBORError) as error:
        raise Rejection(Reason.MALFORMED, printable(str(error))) from None
    if not parsed:
        raise Rejection(Reason.EMPTY_ARRAY, "an array of no readings")
    if len(parsed) > limits.max_array:
        # Each element costs time in which nothing else happens: a few bytes must not buy seconds of it.
        raise Rejection(Reason.ARRAY_TOO_LONG, f"an array of {len(parsed)} readings, more than {limits.max_array}")
    dump = _dump_cbor if is_cbor else _dump_json
    return [_element(kind, device_id, element, len(parsed) - 1, dump, arrival, limits) for element in parsed]


def decode_status(kind: Kind, device_id: str, payload: bytes, arrival: int) -> Presence:
    """What a status message says.

    Raises Rejection (invalid_status).
    """
    online = STATUS.get(payload)
    if online is None:
        raise Rejection(Reason.INVALID_STATUS, 'a status is "online" or "offline"')
    return Presence(device_id, kind, online, arrival)


def encode_reading(reading: Reading) -> bytes:
    """The payload, in the contract's JSON, that decodes to this reading."""
    timestamp = (EPOCH + timedelta(microseconds=reading.ts)).isoformat().replace("+00:00", "Z")
    body: dict[str, Any]
    if isinstance(reading, MeterReading):
        body = {"meterId": reading.device_id, "kwhConsumedAc": reading.kwh_ac, "voltage": reading.voltage}
    else:
        body = {
            "vehicleId": reading.device_id,
            "soc": reading.soc,
            "kwhDeliveredDc": reading.kwh_dc,
            "batteryTemp": reading.battery_temp,
        }
        if reading.meter_id is not None:
            body["meterId"] = reading.meter_id
    return _dump_json(body | {"timestamp": timestamp})


def microseconds(moment: datetime) -> int:
    """A moment, with its zone, as microseconds since 1970."""
    since = moment - EPOCH
    return (since.days * 86_400 + since.seconds) * SECOND + since.microseconds


def printable(text: str, longest: int = 500) -> str:
    """Text that any database and terminal takes: no control characters, no lone surrogates, not endless."""
    cleaned = "".join(character if character.isprintable() else "\ufffd" for character in text[:longest])
    return cleaned if len(text) <= longest else cleaned + "…"


def _parse_cbor(payload: bytes) -> object:
    """One CBOR item, of what JSON can say as well, and dates.

    Raises ValueError or cbor2.CBORError.
    """
    stream = BytesIO(payload)
    # Keys are text: numbers that hash to the same are easily found, and a map of many of them takes hours.
    decoder = cbor2.CBORDecoder(stream, semantic_decoders=_NO_TAGS, read_size=1, strict_hashable_types=True)
    value = decoder.decode()
    if stream.tell() != len(payload):
        raise ValueError("there is more after the CBOR item")
    return value


def _refuse_tag(*_: object) -> NoReturn:
    raise ValueError("this CBOR tag has no place in a reading")


# References could make a small message huge or endless, fractions and patterns slow. Left are dates and big integers.
_NO_TAGS = dict.fromkeys(
    (4, 5, 25, 28, 29, 30, 35, 36, 37, 52, 54, 100, 256, 258, 260, 261, 1004, 43000, 55799), _refuse_tag
)


def _dump_cbor(value: object) -> bytes | None:
    """The value as CBOR; None where it cannot be written down again, such as a date without a zone."""
    try:
        return cbor2.dumps(value)
    except (cbor2.CBORError, ValueError, TypeError, OverflowError):
        return None


def _dump_json(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


def _usual_microseconds(timestamp: str | float) -> int:
    """RFC 3339 as it is usually written, or a number, as microseconds since 1970. Raises ValueError or Rejection."""
    if not isinstance(timestamp, str):
        return _epoch_microseconds(timestamp)
    # With these signs in these places fromisoformat takes nothing that is not RFC 3339.
    if len(timestamp) != USUAL_TIMESTAMP or timestamp[4:17:3] != "--T::" or timestamp[19::4] != ".Z":
        raise ValueError
    since = datetime.fromisoformat(timestamp) - EPOCH
    return (since.days * 86_400 + since.seconds) * SECOND + since.microseconds


def _validate(kind: Kind, value: object) -> dict[str, Any]:
    """The fields of a reading. Raises ValidationError."""
    valid: dict[str, Any] = (_METER if kind is Kind.METER else _VEHICLE).validate_python(value)
    return valid


def _element(
    kind: Kind,
    device_id: str,
    element: object,
    siblings: int,
    dump: Callable[[object], bytes | None],
    arrival: int,
    limits: Limits,
) -> Reading | Rejection:
    """One element of an array: it is rejected alone."""
    try:
        valid = _validate(kind, element)
        if valid.get("timestamp") is not None or not siblings:
            return _reading(kind, device_id, valid, arrival, limits)
        # All would get the same time of arrival, and all but one would count as duplicates.
        rejection = Rejection(Reason.MISSING_FIELD, "timestamp: needed where an array has several readings")
    except ValidationError as error:
        rejection = _rejection(error)
    except Rejection as verdict:
        rejection = verdict
    return Rejection(rejection.reason, rejection.detail, dump(element))


def _reading(kind: Kind, device_id: str, valid: dict[str, Any], arrival: int, limits: Limits) -> Reading:
    timestamp = valid.get("timestamp")
    ts = arrival if timestamp is None else _microseconds(timestamp)
    meter_id = valid.get("meter_id")
    if kind is Kind.METER:
        kwh_ac, voltage = valid["kwh_consumed_ac"], valid["voltage"]
        _check_id(meter_id, device_id)
        _check_cap("kwhConsumedAc", kwh_ac, 0, limits.max_interval_kwh)
        _check_cap("voltage", voltage, 0, limits.max_voltage)
        _check_time(ts, arrival, limits)
        return MeterReading(device_id, ts, kwh_ac, voltage, arrival, timestamp is None)
    kwh_dc, battery_temp = valid["kwh_delivered_dc"], valid["battery_temp"]
    _check_id(valid.get("vehicle_id"), device_id)
    _check_cap("kwhDeliveredDc", kwh_dc, 0, limits.max_interval_kwh)
    _check_cap("batteryTemp", battery_temp, limits.min_battery_temp, limits.max_battery_temp)
    if meter_id is not None and not is_device_id(meter_id):
        raise Rejection(Reason.INVALID_DEVICE_ID, "meterId must be 1 to 128 of A-Z a-z 0-9 . _ : -")
    _check_time(ts, arrival, limits)
    return VehicleReading(device_id, ts, kwh_dc, valid["soc"], battery_temp, meter_id, arrival, timestamp is None)


def _check_id(own_id: str | None, device_id: str) -> None:
    if own_id is not None and own_id != device_id:
        raise Rejection(Reason.ID_MISMATCH, f"the payload says {printable(own_id, 128)!r}, the topic {device_id!r}")


def _check_time(ts: int, arrival: int, limits: Limits) -> None:
    """Comes last, because our clock may be wrong: then all but this is right, and a replay brings the reading back."""
    if ts > arrival + limits.bounds.future:
        raise Rejection(
            Reason.TIMESTAMP_IN_FUTURE, f"timestamp is {(ts - arrival) / SECOND:.0f} s ahead of the bridge's clock"
        )
    if ts < arrival - limits.bounds.past:
        raise Rejection(Reason.TIMESTAMP_TOO_OLD, f"timestamp is older than {limits.horizon_days} days")


def _check_cap(field: str, value: float, lowest: float, highest: float) -> None:
    if not lowest <= value <= highest:
        raise Rejection(Reason.OUT_OF_RANGE, f"{field}: {value:g} is not within {lowest:g} to {highest:g}")


def _microseconds(timestamp: object) -> int:
    """RFC 3339 with a zone, or epoch seconds or milliseconds, as microseconds since 1970."""
    if isinstance(timestamp, str):
        return microseconds(_parse_rfc3339(timestamp))
    if isinstance(timestamp, int | float) and not isinstance(timestamp, bool):
        return _epoch_microseconds(timestamp)
    if not isinstance(timestamp, datetime):
        raise Rejection(Reason.INVALID_TIMESTAMP, "timestamp: must be RFC 3339, epoch seconds or epoch milliseconds")
    return microseconds(_with_zone(timestamp))


def _epoch_microseconds(timestamp: float) -> int:
    if not abs(timestamp) <= MOST_MILLISECONDS:
        raise Rejection(Reason.INVALID_TIMESTAMP, "timestamp: is beyond all calendars")
    return round(timestamp * (SECOND if abs(timestamp) < FIRST_MILLISECONDS else 1_000))


def _parse_rfc3339(timestamp: str) -> datetime:
    # fromisoformat alone takes more of ISO 8601 than RFC 3339 is: week dates, dates without dashes or times.
    if RFC3339.fullmatch(timestamp):
        try:
            return _with_zone(datetime.fromisoformat(timestamp.upper()))
        except ValueError:
            pass  # the 30th of February, or 25 o'clock
    raise Rejection(
        Reason.INVALID_TIMESTAMP,
        f"timestamp: {printable(timestamp, 64)!r} is neither RFC 3339 nor epoch seconds or milliseconds",
    )


def _with_zone(moment: datetime) -> datetime:
    if moment.tzinfo is None:
        raise Rejection(Reason.INVALID_TIMESTAMP, "timestamp: has no time zone; add Z or an offset")
    return moment


_REASONS = {
    "json_invalid": Reason.MALFORMED,
    "missing": Reason.MISSING_FIELD,
    "finite_number": Reason.OUT_OF_RANGE,
    "greater_than_equal": Reason.OUT_OF_RANGE,
    "less_than_equal": Reason.OUT_OF_RANGE,
}


def _rejection(error: ValidationError) -> Rejection:
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = str(first["loc"][0]) if first["loc"] else ""
    if first["type"] == "dict_type":
        return Rejection(Reason.NOT_AN_OBJECT, "a reading is an object")
    reason = _REASONS.get(first["type"], Reason.WRONG_TYPE)
    return Rejection(reason, printable(f"{field}: {first['msg']}" if field else first["msg"]))
