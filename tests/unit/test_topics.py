"""Topics: every device has one, and nothing on the wire does more harm than a rejection."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from bridge.errors import Reason, Rejection
from bridge.topics import Address, Channel, Kind, Topics, _is_device_id, check_template, is_device_id

TELEMETRY = "energy/v1/{kind}/{device_id}/telemetry"
STATUS = "energy/v1/{kind}/{device_id}/status"
TOPICS = Topics(TELEMETRY, STATUS)

kinds = st.sampled_from(Kind)
device_ids = st.from_regex(r"[A-Za-z0-9._:-]{1,128}", fullmatch=True)
# A level of a template: anything but what MQTT and the template itself reserve.
levels = st.text(st.characters(exclude_characters="/+#\0${}", exclude_categories=["Cs"]), max_size=8)


def reason_of(topic: str, topics: Topics = TOPICS) -> Reason:
    with pytest.raises(Rejection) as caught:
        topics.parse(topic)
    return caught.value.reason


@given(kinds, device_ids)
@example(Kind.METER, "m")
@example(Kind.VEHICLE, "x" * 128)
@example(Kind.METER, "telemetry")
@example(Kind.VEHICLE, "meter")
def test_the_telemetry_topic_of_a_device_parses_back_to_it(kind: Kind, device_id: str) -> None:
    assert TOPICS.parse(TOPICS.telemetry(kind, device_id)) == Address(kind, device_id, Channel.TELEMETRY)


@given(kind=kinds, device_id=device_ids, before=st.lists(levels, max_size=3), after=levels, id_first=st.booleans())
def test_every_custom_template_parses_its_own_topics(
    kind: Kind, device_id: str, before: list[str], after: str, *, id_first: bool
) -> None:
    fields = ["{device_id}", "{kind}"] if id_first else ["{kind}", "{device_id}"]
    middle = "/".join([*before, *fields, after])
    topics = Topics(f"t/{middle}", f"s/{middle}")
    assert topics.parse(topics.telemetry(kind, device_id)) == Address(kind, device_id, Channel.TELEMETRY)
    said = f"s/{middle}".replace("{kind}", kind).replace("{device_id}", device_id)
    assert topics.parse(said) == Address(kind, device_id, Channel.STATUS)


@given(st.text(st.characters()) | st.from_regex(r"energy/v1/(meter|vehicle)/[^/]*/(telemetry|status)\s?"))
@example("")
@example("energy/v1/meter/\0/telemetry")
@example("energy/v1/meter/\ud800/telemetry")
@example("energy/v1/meter/MTR-001/telemetry\n")
@example("x" * 70_000)
def test_no_topic_does_more_harm_than_a_rejection(topic: str) -> None:
    rejections: list[Rejection] = []
    try:
        kind, device_id, channel = TOPICS.parse(topic)
    except Rejection as rejection:
        rejections.append(rejection)
    else:
        template = {Channel.TELEMETRY: TELEMETRY, Channel.STATUS: STATUS}[channel]
        assert topic == template.replace("{kind}", kind).replace("{device_id}", device_id)
    assert {rejection.reason for rejection in rejections} <= {Reason.UNKNOWN_TOPIC, Reason.INVALID_DEVICE_ID}
    assert all(rejection.detail for rejection in rejections)


def test_a_status_topic_is_told_from_telemetry() -> None:
    assert TOPICS.parse("energy/v1/vehicle/VEH-001/status") == (Kind.VEHICLE, "VEH-001", Channel.STATUS)


@pytest.mark.parametrize("length", [1, 128])
def test_the_shortest_and_the_longest_device_id_are_taken(length: int) -> None:
    assert TOPICS.parse(f"energy/v1/meter/{'x' * length}/telemetry").device_id == "x" * length


@pytest.mark.parametrize("device_id", ["", "x" * 129, "a b", "ä", "a\n", "\n", "MTR+1", "#", "\uff11", "a\0"])
def test_a_device_id_outside_the_contract_is_rejected(device_id: str) -> None:
    assert reason_of(f"energy/v1/meter/{device_id}/telemetry") is Reason.INVALID_DEVICE_ID


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "/",
        "energy/v1/meter/MTR-001",
        "energy/v1/meter/MTR-001/telemetry/",
        "/energy/v1/meter/MTR-001/telemetry",
        "energy/v1/meter/MTR-001/TELEMETRY",
        "energy/v1/METER/MTR-001/telemetry",
        "energy/v1/charger/MTR-001/telemetry",
        "energy/v1/meter/a/b/telemetry",
        "energy/v1/{kind}/{device_id}/telemetry",
        "$share/g/energy/v1/meter/MTR-001/telemetry",
    ],
)
def test_a_topic_that_no_template_matches_is_unknown(topic: str) -> None:
    assert reason_of(topic) is Reason.UNKNOWN_TOPIC


@pytest.mark.parametrize("text", ["a.b", "a*", "(a|b)", "[a-z]", "^a$", r"\d", "a?", "(?P<kind>x)", "a{2}", "a b"])
def test_what_regular_expressions_reserve_stands_for_itself_in_a_template(text: str) -> None:
    topics = Topics(f"{text}/{{kind}}/{{device_id}}/t", f"{text}/{{kind}}/{{device_id}}/s")
    assert topics.parse(f"{text}/meter/M/t") == (Kind.METER, "M", Channel.TELEMETRY)
    for imitation in ("axb/meter/M/t", "aaa/meter/M/t", "a/meter/M/t", "b/meter/M/t", "7/meter/M/t", "x/meter/M/t"):
        assert reason_of(imitation, topics) is Reason.UNKNOWN_TOPIC


@pytest.mark.parametrize("channel", Channel)
def test_the_filters_match_every_device_of_every_kind_and_nothing_else(channel: Channel) -> None:
    filters = TOPICS.filters(channel)
    assert filters == [f"energy/v1/meter/+/{channel}", f"energy/v1/vehicle/+/{channel}"]


@given(kinds, device_ids)
def test_the_broker_delivers_what_the_parser_takes(kind: Kind, device_id: str) -> None:
    topic = TOPICS.telemetry(kind, device_id)
    matching = [f for f in TOPICS.filters(Channel.TELEMETRY) if re.fullmatch(f.replace("+", "[^/]*"), topic)]
    assert len(matching) == 1


def test_filters_follow_a_custom_template() -> None:
    topics = Topics("{device_id}/plant/{kind}", "{device_id}/plant/{kind}/status")
    assert topics.filters(Channel.TELEMETRY) == ["+/plant/meter", "+/plant/vehicle"]


@pytest.mark.parametrize(
    "template",
    [
        "",
        "energy/telemetry",
        "energy/{kind}/telemetry",
        "energy/{device_id}/telemetry",
        "{kind}/{kind}/{device_id}",
        "{kind}/{device_id}/{device_id}",
        "{kind}/id-{device_id}",
        "{kind}-{device_id}",
        "{kind}/{device_id}/x{device_id}",
        "{kind}/{device_id}/+",
        "{kind}/{device_id}/#",
        "$SYS/{kind}/{device_id}",
        "{kind}/{device_id}/\0",
    ],
)
def test_a_template_that_cannot_tell_devices_apart_is_refused(template: str) -> None:
    with pytest.raises(ValueError, match=re.escape(repr(template))):
        check_template(template)
    with pytest.raises(ValueError, match="must"):
        Topics(template, STATUS)
    with pytest.raises(ValueError, match="must"):
        Topics(TELEMETRY, template)


def test_telemetry_and_status_must_be_told_apart() -> None:
    with pytest.raises(ValueError, match="must differ"):
        Topics(TELEMETRY, TELEMETRY)


def test_names_that_are_too_long_are_not_remembered() -> None:
    before = _is_device_id.cache_info().currsize
    assert not any(is_device_id("x" * length) for length in range(129, 300))
    assert _is_device_id.cache_info().currsize == before


@pytest.mark.parametrize("topic", ["energy/v1/meter/telemetry", "energy/v1/meter/a/b/telemetry", "energy/v1/meter//x"])
def test_what_only_begins_and_ends_like_a_topic_is_none(topic: str) -> None:
    with pytest.raises(Rejection) as caught:
        TOPICS.parse(topic)
    assert caught.value.reason is Reason.UNKNOWN_TOPIC
