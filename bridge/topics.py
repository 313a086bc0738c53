"""Topics: which device a message is from, and what to subscribe to. Pure."""

import re
from enum import StrEnum
from functools import lru_cache
from typing import NamedTuple

from bridge.errors import Reason, Rejection

LONGEST_ID = 128
DEVICE_ID = re.compile(rf"[A-Za-z0-9._:-]{{1,{LONGEST_ID}}}")
# Fleets are finite and talk once a minute: remembering who is who saves two or three matches a message.
REMEMBERED = 65_536


class Kind(StrEnum):
    """What a device measures: a meter the AC side, a vehicle the DC side."""

    METER = "meter"
    VEHICLE = "vehicle"


class Channel(StrEnum):
    """What a topic of a device carries."""

    TELEMETRY = "telemetry"
    STATUS = "status"


class Address(NamedTuple):
    """Who speaks on a topic, and about what."""

    kind: Kind
    device_id: str
    channel: Channel


class Topics:
    """The topics of the fleet, from two templates such as `energy/v1/{kind}/{device_id}/telemetry`.

    Raises ValueError for a template that does not have `{kind}` and `{device_id}` each once as a whole level.
    """

    def __init__(self, telemetry: str, status: str) -> None:
        self._templates = {Channel.TELEMETRY: telemetry, Channel.STATUS: status}
        for template in self._templates.values():
            check_template(template)
        if telemetry == status:
            raise ValueError("the telemetry and the status template must differ")
        # What stands before and after the device.
        self._frames: list[tuple[str, str, Kind, Channel]] = []
        for channel, template in self._templates.items():
            for kind in Kind:
                before, _, after = template.replace("{kind}", kind).partition("{device_id}")
                self._frames.append((before, after, kind, channel))
        self.parse = lru_cache(maxsize=REMEMBERED)(self._parse)

    def filters(self, channel: Channel) -> list[str]:
        """Topic filters that match the devices of each kind, e.g. `energy/v1/meter/+/telemetry`."""
        template = self._templates[channel]
        return [template.replace("{kind}", kind).replace("{device_id}", "+") for kind in Kind]

    def telemetry(self, kind: Kind, device_id: str) -> str:
        """The telemetry topic of one device."""
        return self._templates[Channel.TELEMETRY].replace("{kind}", kind).replace("{device_id}", device_id)

    def _parse(self, topic: str) -> Address:
        """Whose topic this is.

        Raises Rejection (unknown_topic, invalid_device_id).
        """
        for before, after, kind, channel in self._frames:
            if topic.startswith(before) and topic.endswith(after):
                device_id = topic[len(before) : len(topic) - len(after)]
                if DEVICE_ID.fullmatch(device_id):
                    return Address(kind, device_id, channel)
                if "/" not in device_id and len(topic) >= len(before) + len(after):
                    raise Rejection(
                        Reason.INVALID_DEVICE_ID,
                        "the device id in the topic must be 1 to 128 of A-Z a-z 0-9 . _ : -",
                    )
        raise Rejection(Reason.UNKNOWN_TOPIC, "no topic template of the configuration matches")


def is_device_id(name: str) -> bool:
    """Whether this may name a device."""
    # What is too long is not remembered: it may be as long as a message.
    return len(name) <= LONGEST_ID and _is_device_id(name)


@lru_cache(maxsize=REMEMBERED)
def _is_device_id(name: str) -> bool:
    return DEVICE_ID.fullmatch(name) is not None


def check_template(template: str) -> None:
    """Raises ValueError where a topic template cannot tell one device from another."""
    levels = template.split("/")
    for field in ("{kind}", "{device_id}"):
        if levels.count(field) != 1 or template.count(field) != 1:
            raise ValueError(f"{template!r} must have {field} exactly once, as a whole level between slashes")
    if set(template) & set("+#\0") or template.startswith("$"):
        raise ValueError(f"{template!r} must not have wildcards and must not start with $")
