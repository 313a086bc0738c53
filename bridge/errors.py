"""What can go wrong, by what to do about it: exit codes for people and supervisors, reason codes for dead letters."""

from enum import IntEnum, StrEnum


class ExitCode(IntEnum):
    """What the process says when it ends; the same list stands in `wattbridge --help`."""

    OK = 0
    PROBLEM = 1
    USAGE = 2
    REFUSED = 3
    DEADLINE = 4


class WattbridgeError(Exception):
    """Something a person has to mend; printed as one line, never as a traceback."""

    exit_code = ExitCode.PROBLEM


class ConfigError(WattbridgeError):
    """The configuration is wrong; the message names the key, the value and what is allowed."""

    exit_code = ExitCode.USAGE


class BrokerRefusedError(WattbridgeError):
    """The broker refused us for a reason that trying again does not cure."""

    exit_code = ExitCode.REFUSED


class Reason(StrEnum):
    """Why a message or reading became a dead letter. The values are part of the interface: they never change."""

    UNKNOWN_TOPIC = "unknown_topic"
    INVALID_DEVICE_ID = "invalid_device_id"
    MALFORMED = "malformed"
    NOT_AN_OBJECT = "not_an_object"
    EMPTY_ARRAY = "empty_array"
    ARRAY_TOO_LONG = "array_too_long"
    MISSING_FIELD = "missing_field"
    WRONG_TYPE = "wrong_type"
    OUT_OF_RANGE = "out_of_range"
    ID_MISMATCH = "id_mismatch"
    INVALID_TIMESTAMP = "invalid_timestamp"
    TIMESTAMP_IN_FUTURE = "timestamp_in_future"
    TIMESTAMP_TOO_OLD = "timestamp_too_old"
    INVALID_STATUS = "invalid_status"
    CONFLICT = "conflict"
    REFUSED_BY_DATABASE = "refused_by_database"
    UNEXPECTED = "unexpected"


class Rejection(Exception):  # noqa: N818 - a verdict on a message, not an error of ours
    """A message, or one reading of it, that breaks the contract.

    `payload` is the rejected part where that is less than the whole message (an element of an array), else None.
    """

    def __init__(self, reason: Reason, detail: str, payload: bytes | None = None) -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail
        self.payload = payload
