"""The contract as files: current, valid, and saying what the decoder does."""

import importlib.util
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft7Validator, Draft202012Validator
from jsonschema.exceptions import ValidationError
from jsonschema.validators import extend

import bridge
from bridge.errors import Reason, Rejection
from bridge.messages import CBOR, STATUS, Limits, Reading, decode_telemetry, microseconds
from bridge.topics import Kind

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "docs" / "asyncapi.py"
DEVICES = {Kind.METER: "MTR-001", Kind.VEHICLE: "VEH-001"}


def loaded() -> Any:
    spec = importlib.util.spec_from_file_location("contract_as_files", SCRIPT)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


script = loaded()
document = yaml.safe_load((ROOT / "docs/asyncapi.yaml").read_text(encoding="utf-8"))
NOW = yaml.safe_load(f"- {script.EXAMPLES[Kind.METER]['timestamp']}")[0]
ARRIVAL = microseconds(NOW)


def ecma_pattern(_: object, pattern: str, instance: object, __: object) -> Iterator[ValidationError]:
    """JSON Schema means the regular expressions of ECMA 262: $ is the end, not also the line break before it."""
    if isinstance(instance, str) and not re.search(pattern.replace("$", r"\Z"), instance):
        yield ValidationError(f"{instance!r} does not match {pattern!r}")


Draft7 = extend(Draft7Validator, {"pattern": ecma_pattern})
Draft2020 = extend(Draft202012Validator, {"pattern": ecma_pattern})
MESSAGES = {
    kind: Draft7(
        {
            "$ref": f"#/components/schemas/{kind}Readings",
            "components": {"schemas": document["components"]["schemas"]},
        }
    )
    for kind in Kind
}
SCHEMAS = {kind: json.loads((ROOT / f"docs/schemas/{kind}_reading.json").read_text("utf-8")) for kind in Kind}
READINGS = {kind: Draft2020(schema) for kind, schema in SCHEMAS.items()}


def decode(payload: Any, kind: Kind) -> Sequence[Reading | Rejection]:
    try:
        return decode_telemetry(kind, DEVICES[kind], json.dumps(payload).encode(), None, ARRIVAL, Limits())
    except Rejection as rejection:
        return [rejection]


# The files


def test_the_files_are_what_the_code_says() -> None:
    for name, text in script.files().items():
        found = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert found == text, f"docs/{name} is not current; run: make contract"


def test_the_check_tells_old_files_from_current_ones(tmp_path: Path) -> None:
    def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, SCRIPT, *arguments, "--into", tmp_path],
            capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path,
        )  # fmt: skip

    assert "not current" in run("--check").stderr
    assert run().returncode == 0
    assert run("--check").returncode == 0
    schema = tmp_path / "schemas" / "meter_reading.json"
    schema.write_text(schema.read_text().replace("1000", "1001"))
    reply = run("--check")
    assert reply.returncode == 1
    assert "meter_reading.json; run: make contract" in reply.stderr
    assert "vehicle" not in reply.stderr


def test_the_document_is_valid_by_the_schema_of_asyncapi() -> None:
    judge = Draft7Validator(json.loads((ROOT / "tests/unit/asyncapi/3.0.0.json").read_text("utf-8")))
    judge.validate(document)
    document_of_another = document | {"channels": {"meterTelemetry": {"adress": "a/b"}}}
    assert not judge.is_valid(document_of_another)


def test_every_reference_leads_somewhere() -> None:
    def references(part: Any) -> Iterator[str]:
        if isinstance(part, dict):
            for key, value in part.items():
                yield from [value] if key == "$ref" else references(value)
        elif isinstance(part, list):
            for value in part:
                yield from references(value)

    found = list(references(document))
    assert found
    for reference in found:
        target = document
        for step in reference.removeprefix("#/").split("/"):
            target = target[step]


@pytest.mark.parametrize("kind", Kind)
def test_the_schemas_are_schemas(kind: Kind) -> None:
    Draft202012Validator.check_schema(SCHEMAS[kind])
    Draft7Validator.check_schema(document["components"]["schemas"][f"{kind}Readings"])
    Draft7Validator.check_schema(document["components"]["schemas"][f"{kind}Reading"])


def test_topics_codings_and_version_are_those_of_the_code() -> None:
    assert document["info"]["version"] == bridge.__version__
    assert {channel["address"] for channel in document["channels"].values()} == {
        "energy/v1/meter/{device_id}/telemetry",
        "energy/v1/vehicle/{device_id}/telemetry",
        "energy/v1/meter/{device_id}/status",
        "energy/v1/vehicle/{device_id}/status",
        "energy/v1/bridge/{client_id}/status",
    }
    codings = {message["contentType"] for message in document["components"]["messages"].values()}
    assert codings == {"application/json", CBOR, "text/plain"}
    status = document["components"]["messages"]["status"]
    assert [name.encode() for name in status["payload"]["enum"]] == list(STATUS)


def test_the_servers_are_the_listeners_of_mosquitto() -> None:
    config = (ROOT / "mosquitto/mosquitto.conf").read_text(encoding="utf-8")
    listeners = set(re.findall(r"^listener (\d+)", config, re.MULTILINE))
    assert {server["host"].rpartition(":")[2] for server in document["servers"].values()} == listeners


# The examples


def test_the_examples_are_those_of_the_readme() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    shown = [json.loads(line) for line in readme.splitlines() if line.startswith('{"')]
    assert shown == list(script.EXAMPLES.values())


@pytest.mark.parametrize("kind", Kind)
def test_each_example_is_valid_and_every_reading_of_it_is_taken(kind: Kind) -> None:
    examples = document["components"]["messages"][f"{kind}ReadingsJson"]["examples"]
    assert examples
    for shown in examples:
        MESSAGES[kind].validate(shown["payload"])
        assert not any(isinstance(item, Rejection) for item in decode(shown["payload"], kind))
    for payload in SCHEMAS[kind]["examples"]:
        READINGS[kind].validate(payload)


# What the schemas accept and what the decoder accepts

# What no schema can say: who speaks, what time it is, and that some days and hours do not exist.
BEYOND_SCHEMAS = {Reason.ID_MISMATCH, Reason.TIMESTAMP_IN_FUTURE, Reason.TIMESTAMP_TOO_OLD}
NO_SUCH_TIME = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9:]{8}(\.[0-9]+)?([Zz]|[+-][0-9]{2}:[0-9]{2})")

times = (
    st.datetimes(min_value=NOW.replace(tzinfo=None, month=1), max_value=NOW.replace(tzinfo=None)).map(
        lambda moment: f"{moment.isoformat()}Z"
    )
    | st.floats(ARRIVAL / 1e6 - 1e7, ARRIVAL / 1e6)
    | st.integers(ARRIVAL // 1_000 - 10**10, ARRIVAL // 1_000)
)
odd_times = st.from_regex(NO_SUCH_TIME) | st.sampled_from(
    [
        *("2026-02-10T14:47:24", "2026-02-10", "2026-W07-2T14:47:24Z", "20260210T144724Z", "2026-02-10T14:47:24Z\n"),
        *("2026-02-30T14:47:24Z", "2026-02-10T14:47:60Z", "2026-02-10t14:47:24+00:00", "2026-02-10 14:47:24.1z", ""),
        *(10**15, 10**15 + 1, -(10**15) - 1, 1e300, 0, -1, 10**400),
    ]
)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | odd_times,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)
numbers = st.floats(0, 100) | st.integers(0, 100)
edges = st.sampled_from([-61, -60, -1, -5e-324, -0.0, 0, 100, 100.1, 150, 151, 1000, 1000.0001, 1e309, "1", None, True])
values = st.one_of(numbers, numbers, numbers, edges, junk)
ids = (
    st.sampled_from(["MTR-001", "VEH-001", None]) | st.sampled_from(["", "a b", "MTR-001\n", "x" * 129, "ä", 7]) | junk
)
stamps = st.one_of(times, times, times, odd_times, junk)


SPELLINGS = {}
for one_kind, payload_class in script.PAYLOADS.items():
    adapter = script.TypeAdapter(payload_class)
    camel_case, snake_case = (adapter.json_schema(by_alias=aliased)["properties"] for aliased in (True, False))
    SPELLINGS[one_kind] = list(zip(camel_case, snake_case, strict=True))


@st.composite
def payloads(draw: st.DrawFn, kind: Kind) -> dict[str, Any]:
    """Mostly readings: each field in its two spellings, one of them, or none."""
    fields: dict[str, Any] = {}
    for camel, snake in SPELLINGS[kind]:
        of_field = ids if camel.endswith("Id") else stamps if camel == "timestamp" else values
        for name in draw(st.sampled_from([(camel,), (camel,), (camel,), (snake,), (camel, snake), (snake, camel), ()])):
            fields[name] = draw(of_field)
    return fields | draw(st.dictionaries(st.text(max_size=5), junk, max_size=1))


def messages(kind: Kind) -> st.SearchStrategy[Any]:
    one = payloads(kind)
    return st.one_of(one, one, st.lists(one, max_size=3), st.lists(one | junk, max_size=3), junk)


def beyond_schemas(item: Reading | Rejection, payload: Any) -> bool:
    """Whether this is a rejection for a reason that no schema can know."""
    if not isinstance(item, Rejection):
        return False
    if item.reason is Reason.INVALID_TIMESTAMP:
        element = json.loads(item.payload) if item.payload else payload
        return isinstance(element["timestamp"], str) and bool(NO_SUCH_TIME.fullmatch(element["timestamp"]))
    return item.reason in BEYOND_SCHEMAS


def assert_agree(payload: Any, kind: Kind) -> None:
    """What is valid is taken, or rejected for a reason beyond schemas; what is invalid is rejected."""
    items = decode(payload, kind)
    judges = [MESSAGES[kind]] if isinstance(payload, list) else [MESSAGES[kind], READINGS[kind]]
    for judge in judges:
        if judge.is_valid(payload):
            assert all(not isinstance(item, Rejection) or beyond_schemas(item, payload) for item in items), items
        else:
            assert any(isinstance(item, Rejection) for item in items), [*judge.iter_errors(payload)]


@settings(max_examples=200)
@given(messages(Kind.METER))
@example({"kwhConsumedAc": 1, "voltage": 230})
@example({"kwh_consumed_ac": 1, "voltage": 230, "meter_id": "MTR-001"})
@example({"kwhConsumedAc": 1, "kwh_consumed_ac": -1, "voltage": 230, "meterId": None, "meter_id": 7})
@example({"kwhConsumedAc": -1, "kwh_consumed_ac": 1, "voltage": 230})
@example({"kwhConsumedAc": 1, "voltage": 1000.5})
@example({"kwhConsumedAc": 1000.5, "voltage": 230})
@example({"kwhConsumedAc": 1, "voltage": 230, "timestamp": "2026-02-10T14:47:24"})
@example({"kwhConsumedAc": 1, "voltage": 230, "timestamp": "2026-02-10"})
@example({"kwhConsumedAc": 1, "voltage": 230, "timestamp": 10**15 + 1})
@example({"kwhConsumedAc": 1, "voltage": 230, "timestamp": None})
@example([{"kwhConsumedAc": 1, "voltage": 230}])
@example([{"kwhConsumedAc": 1, "voltage": 230}] * 2)
@example([{"kwhConsumedAc": 1, "voltage": 230, "timestamp": None}] * 2)
@example([])
def test_what_the_schema_of_a_meter_accepts_the_decoder_accepts(payload: Any) -> None:
    assert_agree(payload, Kind.METER)


@settings(max_examples=200)
@given(messages(Kind.VEHICLE))
@example({"soc": 100, "kwhDeliveredDc": 0, "batteryTemp": -60, "meterId": "MTR-001\n"})
@example({"soc": 100.5, "kwhDeliveredDc": 0, "batteryTemp": 150})
@example({"soc": 100, "kwh_delivered_dc": 1000, "battery_temp": 150, "vehicle_id": None, "meter_id": "x" * 128})
@example({"soc": 100, "kwhDeliveredDc": 0, "battery_temp": 151})
@example({"soc": 100, "kwhDeliveredDc": 0, "batteryTemp": -60.5})
@example({"soc": 100, "kwhDeliveredDc": 1000.5, "batteryTemp": 0})
@example({"soc": 100, "kwhDeliveredDc": 0, "batteryTemp": 151, "battery_temp": 1})
def test_what_the_schema_of_a_vehicle_accepts_the_decoder_accepts(payload: Any) -> None:
    assert_agree(payload, Kind.VEHICLE)


@pytest.mark.parametrize("kind", Kind)
def test_an_array_may_be_as_long_as_the_decoder_takes(kind: Kind) -> None:
    one = script.EXAMPLES[kind]
    longest = Limits().max_array
    schema = document["components"]["schemas"][f"{kind}Readings"]["anyOf"][-1]
    assert schema["maxItems"] == longest
    assert decode([one] * (longest + 1), kind)[0].reason is Reason.ARRAY_TOO_LONG  # type: ignore[union-attr]
