"""A batch: what it decides by itself, and that no part of it gets lost, whatever is done to it."""

import math
import re
from collections import Counter

from hypothesis import assume, given
from hypothesis import strategies as st

from bridge.batch import Batch, DeadLetter, Key
from bridge.errors import Reason, Rejection
from bridge.messages import DAY, Limits, MeterReading, Presence, Reading, VehicleReading, decode_telemetry
from bridge.topics import Kind, Topics

TOPICS = Topics("energy/v1/{kind}/{device_id}/telemetry", "energy/v1/{kind}/{device_id}/status")
NOW = 1_770_734_845_000_000

METER = MeterReading("M", NOW - 5, 0.5, 230.0, NOW, ts_from_arrival=False)
VEHICLE = VehicleReading("V", NOW - 5, 0.5, 50.0, 30.0, "M", NOW, ts_from_arrival=False)

# Few devices, times and values, so that duplicates and conflicts are the rule.
few_ids = st.sampled_from(["A", "B"])
few_times = st.sampled_from([NOW - DAY, NOW - 2, NOW - 1])
few_values = st.sampled_from([0.0, 0.5])
readings = st.builds(MeterReading, few_ids, few_times, few_values, few_values, st.just(NOW), st.booleans()) | st.builds(
    VehicleReading,
    few_ids,
    few_times,
    few_values,
    few_values,
    few_values,
    st.none() | few_ids,
    st.just(NOW),
    st.booleans(),
)
presences = st.builds(Presence, few_ids, st.sampled_from(Kind), st.booleans(), st.just(NOW))
rejections = st.builds(Rejection, st.sampled_from(Reason), st.text(min_size=1), st.none() | st.binary(max_size=8))
arrivals = st.lists(readings | presences | rejections, max_size=30)


def batch_of(items: list[Reading | Presence | Rejection]) -> Batch:
    batch = Batch(TOPICS)
    for item in items:
        if isinstance(item, Rejection):
            batch.add_rejection(item, "A", "energy/v1/meter/A/telemetry", b"whole", None, NOW)
        elif isinstance(item, Presence):
            batch.add_presence(item)
        else:
            batch.add_reading(item)
    return batch


def halves(batch: Batch) -> list[Batch]:
    """The batch as the database would have it that refuses every one but the smallest."""
    if len(batch) == 0 or len(batch) == len(batch.readings) == 1 or not batch.readings:
        return [batch]
    return [part for half in batch.split() for part in halves(half)]


def test_readings_of_different_devices_times_and_kinds_are_all_kept() -> None:
    others = [
        METER,
        METER._replace(device_id="N"),
        METER._replace(ts=NOW - 6),
        VEHICLE,
        VEHICLE._replace(device_id="M"),
    ]
    batch = batch_of([*others])
    assert batch.readings == others
    assert (batch.received, batch.duplicates, batch.dead_letters) == (5, 0, [])


def test_the_same_values_again_are_a_duplicate() -> None:
    again = METER._replace(received_at=NOW + 9, ts_from_arrival=True)
    batch = batch_of([METER, again, VEHICLE, VEHICLE._replace()])
    assert batch.readings == [METER, VEHICLE]
    assert (batch.received, batch.duplicates, batch.dead_letters) == (4, 2, [])


def test_other_values_are_a_conflict_and_the_first_reading_stays() -> None:
    others: list[Reading] = [
        METER._replace(kwh_ac=0.6),
        METER._replace(voltage=231.0),
        VEHICLE._replace(kwh_dc=0.6),
        VEHICLE._replace(soc=51.0),
        VEHICLE._replace(battery_temp=31.0),
        VEHICLE._replace(meter_id=None),
    ]
    batch = batch_of([METER, VEHICLE, *others])
    assert (list(batch.meters.values()), list(batch.vehicles.values())) == ([METER], [VEHICLE])
    letters, duplicates = batch.conflicts({})
    assert [letter.reason for letter in letters] == [Reason.CONFLICT] * 6
    assert (batch.duplicates, duplicates) == (0, 0)


def test_where_history_knows_the_second_one_that_is_the_duplicate_and_the_first_the_conflict() -> None:
    """As if each had come in a batch of its own."""
    second, third = METER._replace(voltage=231.0), METER._replace(voltage=232.0)
    batch = batch_of([METER, second, third])
    letters, duplicates = batch.conflicts({(Kind.METER, "M", METER.ts): second.values})
    assert [letter.payload for letter in letters] == [batch.conflict(r).payload for r in (METER, third)]
    assert duplicates == 1


def test_after_a_conflict_the_first_values_are_still_a_duplicate() -> None:
    batch = batch_of([METER, METER._replace(voltage=231.0), METER._replace()])
    assert (len(batch.meters), batch.duplicates, len(batch.rivals)) == (1, 1, 1)


def test_duplicates_are_told_apart_by_device() -> None:
    other, rival = METER._replace(device_id="N"), METER._replace(voltage=231.0)
    batch = batch_of(
        [
            METER,
            METER._replace(),
            METER._replace(),
            other,
            VEHICLE,
            VEHICLE._replace(),
            VEHICLE._replace(device_id="M"),
            rival,
        ]
    )
    assert batch.duplicates_of({}) == {(Kind.METER, "M"): 2, (Kind.VEHICLE, "V"): 1}
    # History has what the rival says: then that is the duplicate, and the first one a conflict each time it came.
    known = {(Kind.METER, "M", METER.ts): rival.values}
    assert batch.duplicates_of(known) == {(Kind.METER, "M"): 1, (Kind.VEHICLE, "V"): 1}


@given(arrivals)
def test_duplicates_by_device_are_all_the_duplicates_of_a_batch(items: list[Reading | Presence | Rejection]) -> None:
    batch = batch_of(items)
    assert batch.duplicates_of({}).total() == batch.duplicates
    parts = halves(batch)
    assert sum((part.duplicates_of({}) for part in parts), Counter()) == batch.duplicates_of({})


def test_the_position_of_a_batch_is_that_of_most_of_its_readings() -> None:
    arrived = [METER._replace(ts=NOW + n, ts_from_arrival=True) for n in range(7)]
    backlog = [VEHICLE._replace(ts=NOW - DAY + n) for n in range(4)]
    late = METER._replace(ts=NOW - 9 * DAY)
    batch = batch_of([*arrived, *backlog, late])
    assert (batch.position, batch.oldest) == (NOW - DAY + 1, NOW - 9 * DAY)
    assert batch_of([*arrived]).position == NOW + 3
    nothing = batch_of([Rejection(Reason.MALFORMED, "why")])
    assert (nothing.position, nothing.oldest) == (None, math.inf)


def test_the_dead_letter_of_a_conflict_can_be_replayed_as_the_same_reading() -> None:
    for kind, known, other in (
        (Kind.METER, METER, METER._replace(voltage=231.0)),
        (Kind.VEHICLE, VEHICLE, VEHICLE._replace(soc=51.0)),
    ):
        ((letter,), _) = batch_of([known, other]).conflicts({})
        address = TOPICS.parse(letter.topic)
        assert (address.kind, address.device_id, letter.device_id) == (kind, other.device_id, other.device_id)
        assert letter.received_at == NOW
        assert letter.content_type is None
        assert decode_telemetry(kind, other.device_id, letter.payload, None, NOW, Limits()) == (other,)


def test_the_last_status_of_a_device_stays() -> None:
    online = Presence("M", Kind.METER, online=True, received_at=NOW)
    offline = online._replace(online=False, received_at=NOW + 1)
    vehicle = online._replace(kind=Kind.VEHICLE)
    batch = batch_of([online, vehicle, offline])
    assert set(batch.presences.values()) == {vehicle, offline}
    assert (batch.statuses, batch.received, len(batch)) == (3, 0, 2)


def test_a_dead_letter_is_the_whole_message_or_the_part_that_was_rejected() -> None:
    batch = Batch(TOPICS)
    for part in (None, b"part", b""):
        batch.add_rejection(Rejection(Reason.WRONG_TYPE, "why", part), "D", "t", b"whole", "application/json", NOW)
    assert [letter.payload for letter in batch.dead_letters] == [b"whole", b"part", b""]
    assert set(batch.dead_letters[0]) >= {"D", "t", "application/json", Reason.WRONG_TYPE, "why", NOW}


def test_a_dead_letter_has_no_nul_outside_its_payload() -> None:
    batch = Batch(TOPICS)
    batch.add_rejection(Rejection(Reason.UNKNOWN_TOPIC, "why"), "", "a\0b", b"\0", "text\0", NOW)
    (letter,) = batch.dead_letters
    assert not any("\0" in field for field in letter if isinstance(field, str))
    assert letter.payload == b"\0"


@given(arrivals)
def test_everything_received_is_a_reading_a_duplicate_or_a_dead_letter(
    items: list[Reading | Presence | Rejection],
) -> None:
    batch = batch_of(items)
    statuses = sum(isinstance(item, Presence) for item in items)
    assert batch.received == len(items) - statuses
    assert batch.received == len(batch.readings) + batch.duplicates + len(batch.dead_letters)
    assert batch.statuses == statuses
    assert len(batch) == len(batch.readings) + len(batch.dead_letters) + len(batch.presences)


@given(arrivals)
def test_what_is_kept_is_the_first_reading_of_each_device_and_time(
    items: list[Reading | Presence | Rejection],
) -> None:
    first: dict[tuple[type, str, int], Reading] = {}
    for item in items:
        if isinstance(item, MeterReading | VehicleReading):
            first.setdefault((type(item), item.device_id, item.ts), item)
    batch = batch_of(items)
    assert Counter((*batch.meters.values(), *batch.vehicles.values())) == Counter(first.values())


@given(arrivals)
def test_splitting_ends_in_batches_of_one_reading_and_loses_and_doubles_nothing(
    items: list[Reading | Presence | Rejection],
) -> None:
    batch = batch_of(items)
    batch.replayed = [Key("A", b"digest")]
    parts = halves(batch)
    assert all(len(part.readings) <= 1 for part in parts)
    assert not any(part.rivals for part in parts)
    assert all(part.received == len(part.readings) + part.duplicates + len(part.dead_letters) for part in parts)
    assert Counter(reading for part in parts for reading in part.readings) == Counter(batch.readings)
    assert Counter(letter for part in parts for letter in part.dead_letters) == Counter(batch.dead_letters)
    assert Counter(said for part in parts for said in part.presences.values()) == Counter(batch.presences.values())
    assert [key for part in parts for key in part.replayed] == batch.replayed
    for counter in ("received", "duplicates", "statuses"):
        assert sum(getattr(part, counter) for part in parts) == getattr(batch, counter)


def test_what_is_not_a_reading_goes_apart_first() -> None:
    """Else a refused dead letter would be taken for one of its readings."""
    status = Presence("M", Kind.METER, online=True, received_at=NOW)
    for item in (Rejection(Reason.MALFORMED, "why"), status):
        batch = batch_of([METER, VEHICLE, METER._replace(ts=NOW), item])
        rest, other = batch.split()
        assert (rest.readings, len(rest)) == ([], 1)
        assert other.readings == batch.readings
        assert len(other) == 3


@given(arrivals)
def test_the_parts_of_a_batch_are_smaller_and_have_ids_of_their_own(
    items: list[Reading | Presence | Rejection],
) -> None:
    batch = batch_of(items)
    assume(batch.readings and len(batch) > 1)
    rest, other = batch.split()
    assert len({batch.id, rest.id, other.id}) == 3
    assert 0 < len(rest) < len(batch)
    assert 0 < len(other) < len(batch)


@given(arrivals)
def test_splitting_leaves_the_batch_as_it_was(items: list[Reading | Presence | Rejection]) -> None:
    batch = batch_of(items)
    before = (list(batch.readings), list(batch.dead_letters), dict(batch.presences), batch.received, batch.id)
    batch.split()
    batch.refused("why")
    assert (batch.readings, batch.dead_letters, batch.presences, batch.received, batch.id) == before


@given(arrivals, st.text(min_size=1))
def test_a_refused_batch_has_its_readings_as_dead_letters(
    items: list[Reading | Presence | Rejection], why: str
) -> None:
    batch = batch_of(items)
    refused = batch.refused(why)
    known = len(batch.dead_letters)
    assert refused.readings == []
    assert refused.id != batch.id
    assert refused.dead_letters[:known] == batch.dead_letters
    letters = refused.dead_letters[known:]
    assert len(letters) == len(batch.readings)
    assert {(letter.reason, letter.detail) for letter in letters} <= {(Reason.REFUSED_BY_DATABASE, why)}
    assert (refused.received, refused.duplicates) == (batch.received, batch.duplicates)
    assert (refused.presences, refused.statuses) == (batch.presences, batch.statuses)


def letter_of(topic: str, content_type: str | None, payload: bytes) -> DeadLetter:
    return DeadLetter("D", topic, payload, content_type, Reason.MALFORMED, "why", NOW)


def test_the_digest_is_stable() -> None:
    """It is a primary key in databases that exist: another one would be another dead letter."""
    letter = letter_of("energy/v1/meter/D/telemetry", "application/json", b"{")
    assert letter.digest.hex() == "baa8f54fe9e00ba1573cc670f421738ca202ce91b1b4d923385b00a908842564"


def test_the_digest_is_that_of_the_content_and_not_of_the_circumstances() -> None:
    letter = letter_of("t", None, b"p")
    later = letter._replace(received_at=NOW + 1, detail="other words", reason=Reason.CONFLICT, device_id="E")
    assert later.digest == letter.digest


contents = st.tuples(
    st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=3),
    st.none() | st.text(st.sampled_from("ab"), min_size=1, max_size=2),
    st.binary(max_size=3) | st.text(st.sampled_from("\0ab"), max_size=4).map(str.encode),
)


@given(contents, contents)
def test_other_content_has_another_digest(
    one: tuple[str, str | None, bytes], other: tuple[str, str | None, bytes]
) -> None:
    assert (letter_of(*one).digest == letter_of(*other).digest) == (one == other)


def test_bytes_cannot_be_moved_between_topic_content_type_and_payload() -> None:
    alike = [("ab", None, b"c"), ("a", None, b"bc"), ("a", "b", b"c"), ("a", None, b"b\0c"), ("a", None, b"\0b\0c")]
    assert len({letter_of(*content).digest for content in alike}) == len(alike)


def test_a_digest_fits_its_column() -> None:
    assert re.fullmatch(r"[0-9a-f]{64}", letter_of("t", None, b"p").digest.hex())
