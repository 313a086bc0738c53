"""Write the contract as files: docs/asyncapi.yaml and docs/schemas/*.json, from the code that decodes the messages.

`make contract` runs it. With --check it writes nothing, and ends with 1 where the files are not current.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

import bridge
from bridge.config import Mqtt, TopicTemplates
from bridge.messages import (
    CBOR,
    FIRST_MILLISECONDS,
    MOST_MILLISECONDS,
    RFC3339,
    STATUS,
    Limits,
    MeterPayload,
    VehiclePayload,
)
from bridge.topics import DEVICE_ID, Kind

DOCS = Path(__file__).resolve().parent
JSON = "application/json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
LIMITS = Limits()
MQTT = Mqtt()
TOPICS = TopicTemplates()
EXAMPLES: dict[Kind, dict[str, Any]] = {
    Kind.METER: {
        "meterId": "MTR-001",
        "kwhConsumedAc": 0.4796,
        "voltage": 232.0,
        "timestamp": "2026-02-10T14:47:24.841Z",
    },
    Kind.VEHICLE: {
        "vehicleId": "VEH-001",
        "soc": 20.7,
        "kwhDeliveredDc": 0.4227,
        "batteryTemp": 30.1,
        "timestamp": "2026-02-10T14:47:24.841Z",
        "meterId": "MTR-001",
    },
}
PAYLOADS = {Kind.METER: MeterPayload, Kind.VEHICLE: VehiclePayload}
# The caps of the configuration, which the payload classes do not have.
CAPS = {
    "kwhConsumedAc": {"maximum": LIMITS.max_interval_kwh},
    "kwhDeliveredDc": {"maximum": LIMITS.max_interval_kwh},
    "voltage": {"maximum": LIMITS.max_voltage},
    "batteryTemp": {"minimum": LIMITS.min_battery_temp, "maximum": LIMITS.max_battery_temp},
}
DEVICE_ID_PATTERN = f"^{DEVICE_ID.pattern}$"
# The decoder takes a time without its zone for long enough to say what is wrong with it.
TIMESTAMP_PATTERN = f"^{RFC3339.pattern.removesuffix('?')}$"

ABOUT = f"""\
What devices say to Wattbridge, and what Wattbridge says itself, over MQTT 5. Made from the code by `make contract`;
the topics and limits are those of the default configuration.

**Identity.** The device is the topic's. An id in the payload may be left out; where it differs from the topic's, the
reading is rejected: a device must not speak for another.

**Time.** A reading is identified by device and `timestamp`. RFC 3339 needs a zone. A number is epoch seconds, from
{FIRST_MILLISECONDS:,} on epoch milliseconds. A reading that is more than {LIMITS.max_future_s:g} seconds ahead of
the bridge's clock, or more than {LIMITS.horizon_days} days behind it, is rejected.

**Again.** The same device, time and values are a duplicate: it changes nothing. The same device and time with other
values are a conflict: the first reading stays, the second is rejected. A device may send anything again.

**Rejected** readings are kept with a reason as dead letters. Of an array each reading is judged for itself.

**Fields.** Unknown fields are ignored. Each name is also accepted in snake_case (`kwh_consumed_ac`); where both
spellings are there, camelCase counts. A field that is said twice counts as the last time.

**Acknowledgement.** A message with QoS 1 is acknowledged by the broker. The bridge acknowledges to the broker after
PostgreSQL has committed. QoS 0 is taken as well, and may be lost.

A message, with everything MQTT adds, has at most {MQTT.max_packet_size:,} bytes; the broker may allow less.
"""


def main() -> None:
    """Write the files, or with --check say which are not current."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--check", action="store_true", help="write nothing; end with 1 where a file is not current")
    parser.add_argument("--into", type=Path, default=DOCS, metavar="FOLDER", help="default: docs")
    arguments = parser.parse_args()
    old = []
    for name, text in files().items():
        path = arguments.into / name
        if arguments.check:
            if not path.is_file() or path.read_text(encoding="utf-8") != text:
                old.append(str(path))
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
    if old:
        sys.exit(f"not current: {', '.join(old)}; run: make contract")


def files() -> dict[str, str]:
    """Each file's text, by its path in docs/."""
    header = "# Made by `make contract` (docs/asyncapi.py) from the code. Change the code, not this file.\n"
    made = {"asyncapi.yaml": header + as_yaml(document())}
    for kind in Kind:
        schema = {"$schema": DIALECT, "$id": f"urn:wattbridge:energy:v1:{kind}_reading"} | reading(kind)
        made[f"schemas/{kind}_reading.json"] = json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
    return made


def document() -> dict[str, Any]:
    """The AsyncAPI document."""
    channels = {f"{kind}Telemetry": telemetry_channel(kind) for kind in Kind}
    channels |= {f"{kind}Status": status_channel(kind) for kind in Kind}
    channels["bridgeStatus"] = {
        "address": TOPICS.bridge_status,
        "title": "Presence of the bridge",
        "servers": [{"$ref": "#/servers/services"}],
        "parameters": {
            "client_id": {"description": "Client id of the bridge (`mqtt.client_id`).", "default": MQTT.client_id}
        },
        "messages": {"status": {"$ref": "#/components/messages/status"}},
    }
    messages = {f"{kind}Readings{coding}": message(kind, coding) for kind in Kind for coding in ("Json", "Cbor")}
    messages["status"] = {
        "title": "Presence",
        "summary": "Whether a device, or the bridge, is connected. Retained; the offline one is also the last will.",
        "contentType": "text/plain",
        "payload": {"type": "string", "enum": [status.decode() for status in STATUS]},
        "examples": [{"name": status.decode(), "payload": status.decode()} for status in STATUS],
    }
    schemas: dict[str, Any] = {}
    for kind in Kind:
        schemas[f"{kind}Reading"] = rebased(reading(kind), f"#/components/schemas/{kind}Reading")
        schemas[f"{kind}Readings"] = readings(kind)
    return {
        "asyncapi": "3.0.0",
        "info": {
            "title": "Wattbridge",
            "version": bridge.__version__,
            "description": ABOUT,
            "license": {"name": "MIT"},
            "tags": [{"name": "energy"}, {"name": "mqtt"}],
        },
        "defaultContentType": JSON,
        "servers": servers(),
        "channels": channels,
        "operations": operations(),
        "components": {
            "messages": messages,
            "schemas": schemas,
            "securitySchemes": {
                "certificate": {
                    "type": "X509",
                    "description": "A client certificate. Its common name is the user name; of a device, its id.",
                },
                "password": {"type": "userPassword", "description": "The user name is the device id."},
            },
        },
    }


def servers() -> dict[str, Any]:
    """The listeners of mosquitto/mosquitto.conf, and how the bridge connects."""

    def server(title: str, port: int, security: str) -> dict[str, Any]:
        return {
            "host": f"broker.example:{port}",
            "protocol": "mqtts",
            "protocolVersion": "5.0",
            "title": title,
            "security": [{"$ref": f"#/components/securitySchemes/{security}"}],
        }

    topic = TOPICS.bridge_status.replace("{client_id}", MQTT.client_id)
    will = {"topic": topic, "qos": 1, "message": "offline", "retain": True}
    connects = {
        "clientId": MQTT.client_id,
        "cleanSession": False,
        "lastWill": will,
        "keepAlive": MQTT.keep_alive_s,
        "sessionExpiryInterval": MQTT.session_expiry_s,
        "maximumPacketSize": MQTT.max_packet_size,
        "bindingVersion": "0.2.0",
    }
    return {
        "devices": server("Devices with a certificate", 8883, "certificate"),
        "passwords": server("Devices with a password", 8885, "password"),
        "services": server("The bridge and other services", 8884, "certificate") | {"bindings": {"mqtt": connects}},
    }


def telemetry_channel(kind: Kind) -> dict[str, Any]:
    """Where the devices of a kind publish their readings."""
    return {
        "address": TOPICS.telemetry.replace("{kind}", kind),
        "title": f"Telemetry of a {kind}",
        "servers": device_servers(),
        "parameters": device_parameter(),
        "messages": {
            coding.lower(): {"$ref": f"#/components/messages/{kind}Readings{coding}"} for coding in ("Json", "Cbor")
        },
    }


def status_channel(kind: Kind) -> dict[str, Any]:
    """Where the devices of a kind say whether they are there."""
    return {
        "address": TOPICS.status.replace("{kind}", kind),
        "title": f"Presence of a {kind}",
        "servers": device_servers(),
        "parameters": device_parameter(),
        "messages": {"status": {"$ref": "#/components/messages/status"}},
    }


def device_servers() -> list[dict[str, str]]:
    """Where devices publish and the bridge subscribes."""
    return [{"$ref": f"#/servers/{name}"} for name in ("devices", "passwords", "services")]


def device_parameter() -> dict[str, Any]:
    """The device in a topic."""
    return {"device_id": {"description": f"Who speaks. It matches `{DEVICE_ID_PATTERN}`."}}


def operations() -> dict[str, Any]:
    """What the bridge does."""

    def operation(action: str, channel: str, names: list[str], summary: str, *, retain: bool) -> dict[str, Any]:
        return {
            "action": action,
            "channel": {"$ref": f"#/channels/{channel}"},
            "summary": summary,
            "bindings": {"mqtt": {"qos": 1, "retain": retain, "bindingVersion": "0.2.0"}},
            "messages": [{"$ref": f"#/channels/{channel}/messages/{name}"} for name in names],
        }

    made = {}
    for kind in Kind:
        made[f"receive{kind.title()}Telemetry"] = operation(
            "receive",
            f"{kind}Telemetry",
            ["json", "cbor"],
            f"Takes the readings of a {kind} into history.",
            retain=False,
        )
    for kind in Kind:
        made[f"receive{kind.title()}Status"] = operation(
            "receive", f"{kind}Status", ["status"], f"Notes whether a {kind} is connected.", retain=True
        )
    made["sendBridgeStatus"] = operation(
        "send", "bridgeStatus", ["status"], "Says whether the bridge itself is connected.", retain=True
    )
    return made


def message(kind: Kind, coding: str) -> dict[str, Any]:
    """Readings of a device in one coding."""
    made = {
        "title": f"Readings of a {kind}, {coding.upper()}",
        "summary": "One reading, or an array of them, such as those of an outage.",
        "contentType": JSON if coding == "Json" else CBOR,
        "payload": {"$ref": f"#/components/schemas/{kind}Readings"},
    }
    if coding == "Cbor":
        made["description"] = (
            "The same as in JSON. The content type must be given. Keys are text. "
            "A timestamp may also be a date of CBOR (tag 0 with a zone, or tag 1)."
        )
        return made
    made["description"] = "Without a content type, or with any other, a payload is JSON."
    one = EXAMPLES[kind]
    earlier = one | {"timestamp": "2026-02-10T14:46:24.841Z"}
    made["examples"] = [
        {"name": "reading", "summary": "One reading.", "payload": one},
        {"name": "backfill", "summary": "What an outage has kept back.", "payload": [earlier, one]},
        {
            "name": "least",
            "summary": "Nothing that may be left out: the time is that of the arrival.",
            "payload": {name: one[name] for name in TypeAdapter(PAYLOADS[kind]).json_schema()["required"]},
        },
    ]
    return made


def reading(kind: Kind) -> dict[str, Any]:
    """The JSON Schema of one reading: what it accepts the decoder accepts, but for who speaks and what time it is."""
    source = TypeAdapter(PAYLOADS[kind])
    contract, snake = source.json_schema(by_alias=True), source.json_schema(by_alias=False)
    properties = {}
    fallbacks = []
    for name, other in zip(contract["properties"], snake["properties"], strict=True):
        properties[name] = value(name, contract["properties"][name])
        required = [other] if other in snake["required"] else []
        if other != name:
            otherwise: dict[str, Any] = {"properties": {other: {"$ref": f"#/properties/{name}"}}}
            if required:
                otherwise["required"] = required
            fallbacks.append({"if": {"required": [name]}, "else": otherwise})
    return {
        "title": f"{kind.title()} reading",
        "description": contract["description"]
        + " The names are camelCase; in place of each its snake_case spelling is accepted. Unknown fields are ignored.",
        "type": "object",
        "properties": properties,
        "required": [name for name in contract["required"] if name in snake["properties"]],
        "allOf": fallbacks,
        "examples": [EXAMPLES[kind]],
    }


def value(name: str, said: dict[str, Any]) -> dict[str, Any]:
    """The schema of one field: what its class says, and what the decoder checks beside it."""
    description = said["description"]
    if name == "timestamp":
        number = {"type": "number", "minimum": -MOST_MILLISECONDS, "maximum": MOST_MILLISECONDS}
        text = {"type": "string", "format": "date-time", "pattern": TIMESTAMP_PATTERN}
        return {"description": description, "anyOf": [text, number, {"type": "null"}]}
    if name.endswith("Id"):
        return {"description": description, "type": ["string", "null"], "pattern": DEVICE_ID_PATTERN}
    limits = {key: said[key] for key in ("minimum", "maximum") if key in said}
    return {"description": description, "type": said["type"]} | limits | CAPS.get(name, {})


def readings(kind: Kind) -> dict[str, Any]:
    """The schema of a message: a reading, or several. Where there are several, each needs its time."""
    one = {"$ref": f"#/components/schemas/{kind}Reading"}
    timed = {"required": ["timestamp"], "properties": {"timestamp": {"not": {"type": "null"}}}}
    return {
        "title": f"Readings of a {kind}",
        "anyOf": [
            one,
            {"title": "Array of one", "type": "array", "minItems": 1, "maxItems": 1, "items": one},
            {
                "title": "Array of several",
                "description": "Each reading needs its timestamp.",
                "type": "array",
                "minItems": 2,
                "maxItems": LIMITS.max_array,
                "items": {"allOf": [one, timed]},
            },
        ],
    }


def rebased(schema: Any, root: str) -> Any:  # noqa: ANN401 - any part of a schema
    """The schema, where it stands inside of another document."""
    if isinstance(schema, dict):
        return {
            key: root + part.removeprefix("#") if key == "$ref" else rebased(part, root) for key, part in schema.items()
        }
    return [rebased(part, root) for part in schema] if isinstance(schema, list) else schema


class _Dumper(yaml.SafeDumper):
    """Block style, nothing by reference, lists indented under their key."""

    def ignore_aliases(self, _: object) -> bool:
        return True

    def increase_indent(self, flow: bool = False, indentless: bool = False) -> None:  # noqa: ARG002, FBT001, FBT002 - PyYAML's signature
        super().increase_indent(flow, indentless=False)


def _text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None)


_Dumper.add_representer(str, _text)


def as_yaml(made: dict[str, Any]) -> str:
    """The document as YAML, always the same."""
    return yaml.dump(made, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120, default_flow_style=False)


if __name__ == "__main__":
    main()
