"""What HTTP is about: errors, pages, ETags, tokens, headers, the OpenAPI document."""

import contextlib
import json
from datetime import UTC, datetime
from typing import Any
from urllib.parse import quote, urlencode

import jsonschema
import pytest

from tests.integration.harness import ask
from tests.web.serving import Answer, Web

ROUTES = [
    "/v1/analytics/performance/VEH-01",
    "/v1/analytics/fleet",
    "/v1/analytics/fleet/inefficient",
    "/v1/analytics/chargers",
    "/v1/analytics/sessions",
    "/v1/analytics/energy",
    "/v1/status/vehicle",
    "/v1/status/vehicle/VEH-01",
    "/v1/status/meter",
    "/v1/status/meter/MTR-01",
    "/v1/status/silent",
    "/v1/ingest",
    "/v1/dead-letters",
]
PERFORMANCE = "/v1/analytics/performance/VEH-01"


def problem(answer: Answer, status: int, path: str) -> str:
    """The message of a problem, whose rest must be as it is always."""
    assert (answer.status, answer.headers["content-type"]) == (status, "application/problem+json"), answer
    assert answer.headers["cache-control"] == "no-store"
    said = answer.json()
    assert set(said) == {"type", "title", "status", "path", "message", "timestamp"}
    assert (said["type"], said["status"], said["path"]) == ("about:blank", status, path)
    assert abs((datetime.now(UTC) - datetime.fromisoformat(said["timestamp"])).total_seconds()) < 10
    assert said["timestamp"].endswith("Z")
    return said["message"]


# Errors


@pytest.mark.parametrize("path", ["/v1", "/v1/status", "/docs", "/redoc", "/v1/status/vehicle/", "//", "/%00", "/ü"])
def test_an_unknown_path(web: Web, path: str) -> None:
    answer = web.ask(path)
    assert answer.status == 404
    assert answer.json()["message"] == "there is no such path; /openapi.json lists all"
    assert answer.json()["title"] == "Not Found"


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS"])
def test_a_method_that_would_write(web: Web, method: str) -> None:
    answer = web.ask("/v1/ingest", method=method)
    assert problem(answer, 405, "/v1/ingest") == "only GET and HEAD: nothing is written"
    assert answer.headers["allow"] == "GET, HEAD"


@pytest.mark.parametrize(
    ("path", "said"),
    [
        (f"{PERFORMANCE}?hours=0", "hours is '0': Input should be greater than or equal to 1"),
        (f"{PERFORMANCE}?hours=8785", "hours is '8785': Input should be less than or equal to 8784"),
        (f"{PERFORMANCE}?hours=nan", "hours is 'nan': Input should be a finite number"),
        (f"{PERFORMANCE}?hours=many", "hours is 'many': Input should be a valid number"),
        (f"{PERFORMANCE}?hour=1", "hour: there is no such parameter; there are hours, since, until"),
        ("/v1/ingest?limit=1", "limit: there is no such parameter"),
        (f"{PERFORMANCE}?since=yesterday", "since is 'yesterday': a time is RFC 3339 with a zone"),
        (f"{PERFORMANCE}?since=2026-02-10T00:00:00", "a time is RFC 3339 with a zone"),
        (f"{PERFORMANCE}?since=1700000000", "a time is RFC 3339 with a zone"),
        (f"{PERFORMANCE}?since=2026-02-10T00:00:00+01:00", "+ is written %2B"),
        (f"{PERFORMANCE}?since=2026-02-30T00:00:00Z", "there is no such time"),
        (f"{PERFORMANCE}?since=0001-01-01T00:00:00%2B14:00", "there is no such time"),
        (f"{PERFORMANCE}?since=1969-12-31T23:59:59Z", "not before 1970"),
        (f"{PERFORMANCE}?until=2026-02-10T00:00:00Z", "until needs a since"),
        (f"{PERFORMANCE}?hours=3&since=2026-02-10T00:00:00Z", "leave one out"),
        (f"{PERFORMANCE}?since=2026-02-10T00:00:00Z&until=2026-02-10T00:00:00Z", "since must be before until"),
        ("/v1/analytics/fleet?since=2100-01-01T00:00:00Z", "since is '2100-01-01T00:00:00Z': closed quarter hours end"),
        ("/v1/analytics/chargers?finding=broken", "finding is 'broken': Input should be 'inefficient' or 'mapping"),
        ("/v1/analytics/energy?resolution=minute", "resolution is 'minute': Input should be 'quarter_hour', 'hour' or"),
        ("/v1/analytics/energy?meter=a%20b", "meter is 'a b': an id is 1 to 128 of A-Z a-z 0-9 . _ : -"),
        ("/v1/analytics/energy?after=1", "after is '1': take it from `next`"),
        ("/v1/analytics/sessions?after=V1", "after is 'V1': take it from `next`"),
        ("/v1/analytics/fleet/inefficient?after=V1~much", "after is 'V1~much': take it from `next`"),
        ("/v1/status/silent?after=a~b", "after is 'a~b': take it from `next`"),
        ("/v1/status/silent?kind=car", "kind is 'car': Input should be 'meter' or 'vehicle'"),
        ("/v1/status/vehicle?limit=0", "limit is '0': Input should be greater than or equal to 1"),
        ("/v1/status/vehicle?limit=1001", "limit is '1001': Input should be less than or equal to 1000"),
        ("/v1/status/vehicle?online=perhaps", "online is 'perhaps': Input should be a valid boolean"),
        ("/v1/status/vehicle?after=%00", "after is '\\x00'"),
    ],
)
def test_a_parameter_that_is_not_allowed(web: Web, path: str, said: str) -> None:
    answer = web.ask(path)
    assert said in problem(answer, 422, path.partition("?")[0])


HOSTILE = [
    "' OR 1=1 --",
    "'; DROP TABLE vehicle_live; --",
    "$1",
    "%(vehicle)s",
    "%s",
    "\0",
    "a\nb",
    "ä",
    "😀",
    "\u202e",
    "*",
    "a b",
    "=1+1",
    "<script>",
    "{{7*7}}",
    "a" * 129,
    "\\",
    "a;b",
    "..%2f",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_id(web: Web, name: str) -> None:
    for path in ("/v1/status/vehicle", "/v1/status/meter", "/v1/analytics/performance"):
        answer = web.ask(f"{path}/{quote(name, safe='')}")
        assert answer.status == 422
        assert answer.headers["content-type"] == "application/problem+json"
        assert "an id is 1 to 128 of A-Z a-z 0-9 . _ : -" in answer.json()["message"]
        assert len(answer.body) < 2_000
    for path in ROUTES:
        for parameter in ("vehicle", "after", name):
            answer = web.ask(f"{path}?{urlencode({parameter: name})}")
            assert answer.status in (200, 422)
            assert answer.status == 422 or parameter == "after"
    assert web.ask("/readyz").status == 200


def test_an_endless_address_is_refused(web: Web) -> None:
    with contextlib.suppress(ConnectionError):  # it may be hung up before all of it is sent
        assert web.ask(f"/v1/status/vehicle/{'a' * 200_000}").status in (400, 422)
    assert web.ask("/livez").status == 200


# Headers


@pytest.mark.parametrize("path", [*ROUTES, "/livez", "/openapi.json", "/nowhere", "/v1/status/vehicle?limit=0"])
def test_every_answer_is_guarded(web: Web, path: str) -> None:
    headers = web.ask(path).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "DENY"
    assert headers["referrer-policy"] == "same-origin"
    assert headers["cross-origin-opener-policy"] == "same-origin"
    assert headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
    assert headers["vary"] == "Accept, Authorization"
    assert "server" not in headers
    assert not [name for name in headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ROUTES)
def test_a_head_is_the_answer_without_its_body(web: Web, path: str) -> None:
    whole, head = web.ask(path), web.ask(path, method="HEAD")
    assert (head.status, head.body) == (200, b"")
    for name in ("content-type", "content-length", "cache-control"):
        assert head.headers[name] == whole.headers[name]


@pytest.mark.parametrize("path", ROUTES)
def test_what_is_known_is_not_sent_again(web: Web, path: str) -> None:
    # A window of hours begins a second later each second.
    path += "?since=2026-02-10T00:00:00Z&until=2100-01-01T00:00:00Z" * path.endswith(("VEH-01", "energy", "sessions"))
    path = path if "status" not in path else path.partition("?")[0]
    first = web.ask(path)
    tag = first.headers["etag"]
    assert len(tag) == 34
    for known in (tag, f'"other", W/{tag}', "*"):
        again = web.ask(path, headers={"If-None-Match": known})
        assert (again.status, again.body, again.headers["etag"]) == (304, b"", tag)
        assert again.headers["cache-control"].split("=")[0] == first.headers["cache-control"].split("=")[0]
    assert web.ask(path, headers={"If-None-Match": '"other"'}).status == 200
    csv = web.ask(path, headers={"Accept": "text/csv"})
    assert csv.headers["etag"] != tag


def test_how_long_an_answer_may_be_kept(web: Web, fleet: str) -> None:
    for path in ROUTES:
        cache = web.ask(path).headers["cache-control"]
        if "/fleet" in path or "chargers" in path:
            ((left,),) = ask(fleet, "SELECT extract(epoch FROM moves_at - now())::float FROM closed_24h")
            assert int(cache.removeprefix("private, max-age=")) == pytest.approx(left, abs=3)
            assert 0 < left <= 900
        elif "analytics" in path:
            assert cache == "private, max-age=5"
        else:
            assert cache == "private, no-cache"
    window = "?since=2026-02-10T00:00:00Z&until=2026-02-11T00:00:00Z"
    assert web.ask(f"/v1/analytics/fleet{window}").headers["cache-control"] == "private, max-age=5"


@pytest.mark.parametrize(
    ("accept", "given"),
    [
        ("", "json"),
        ("*/*", "json"),
        ("application/json", "json"),
        ("text/html, */*;q=0.8", "json"),
        ("text/*", "csv"),
        ("text/csv", "csv"),
        ("TEXT/CSV; q=1", "csv"),
        ("application/json;q=0.5, text/csv", "csv"),
        ("text/csv;q=0.5, application/json", "json"),
        ("text/csv;q=0, */*", "json"),
        ("*/*, application/json;q=0", "csv"),
        ("text/html", None),
        ("application/json;q=0", None),
        (";;;,,q=", None),
    ],
)
def test_the_form_is_that_which_is_liked_best(web: Web, accept: str, given: str | None) -> None:
    answer = web.ask("/v1/ingest", headers={"Accept": accept})
    if given is None:
        assert problem(answer, 406, "/v1/ingest") == "there is application/json and text/csv"
    else:
        assert answer.status == 200
        assert given in answer.headers["content-type"]


# Pages


@pytest.mark.parametrize(
    "path",
    [
        "/v1/status/vehicle",
        "/v1/status/vehicle?charging=true",
        "/v1/status/vehicle?online=false",
        "/v1/status/silent",
        "/v1/analytics/fleet/inefficient",
        "/v1/analytics/chargers",
        "/v1/analytics/sessions",
        "/v1/analytics/sessions?meter=MTR-00",
        "/v1/analytics/energy?resolution=quarter_hour&hours=6.3",
        "/v1/analytics/energy?resolution=hour&meter=MTR-00",
        "/v1/analytics/energy?resolution=day&since=2026-02-10T00:00:00Z",
    ],
)
def test_pages_are_the_list(web: Web, path: str) -> None:
    whole = web.get(path)["items"]
    assert len(whole) > 1
    joint = f"{path}{'&' if '?' in path else '?'}limit="
    for limit in (1, 3):
        parts = list(web.pages(f"{joint}{limit}"))
        # The order of the terms of a sum is free.
        assert [rounded(item) for part in parts for item in part] == [rounded(item) for item in whole]
        assert [len(part) for part in parts[:-1]] == [limit] * (len(parts) - 1)
    assert web.get(f"{joint}{len(whole)}")["next"] is None
    answer = web.ask(f"{joint}1")
    assert answer.headers["link"] == f'<{answer.json()["next"]}>; rel="next"'
    assert "link" not in web.ask(f"{joint}{len(whole)}").headers


def rounded(value: Any) -> Any:
    match value:
        case float():
            return round(value, 9)
        case dict():
            return {name: rounded(item) for name, item in value.items()}
        case list():
            return [rounded(item) for item in value]
        case _:
            return value


def test_the_pages_of_a_window_are_about_the_same_time(web: Web) -> None:
    first = web.get("/v1/analytics/chargers?limit=5&hours=30")
    assert "hours" not in first["next"]
    assert urlencode({"since": first["items"][0]["since"]}) in first["next"]
    assert urlencode({"until": first["items"][0]["until"]}) in first["next"]


# The OpenAPI document


def test_the_document_describes_every_answer(web: Web) -> None:
    document = web.get("/openapi.json")
    assert document["openapi"].startswith("3.1")
    described = {path.replace("{vehicle}", "VEH-01").replace("{meter}", "MTR-01") for path in document["paths"]}
    assert described == set(ROUTES)
    for template, path in document["paths"].items():
        assert list(path) == ["get"]
        responses = path["get"]["responses"]
        schema = responses["200"]["content"]["application/json"]["schema"] | {"components": document["components"]}
        jsonschema.Draft202012Validator.check_schema(schema)
        answer = web.get(template.replace("{vehicle}", "VEH-01").replace("{meter}", "MTR-01"))
        jsonschema.validate(answer, schema, format_checker=jsonschema.FormatChecker())
        assert "items" not in answer or answer["items"]
        for code in ("401", "406", "422", "503"):
            assert list(responses[code]["content"]) == ["application/problem+json"]
    said = web.ask("/v1/status/vehicle?limit=0").json()
    schema = {"$ref": "#/components/schemas/Problem", "components": document["components"]}
    jsonschema.validate(said, schema)


def test_the_examples_of_the_document_are_true(web: Web) -> None:
    tried = 0
    for template, path in web.get("/openapi.json")["paths"].items():
        example = path["get"]["responses"]["200"]["content"]["application/json"].get("example")
        if example is None:
            continue
        address, query = template, {}
        for parameter in path["get"]["parameters"]:
            value = next(iter(parameter.get("examples") or parameter["schema"].get("examples") or [None]))
            if parameter["in"] == "path":
                address = address.replace(f"{{{parameter['name']}}}", value)
            elif value is not None:
                query[parameter["name"]] = value
        assert query, template
        # But for what the order of the terms does to a sum of doubles.
        assert rounded(web.get(f"{address}?{urlencode(query)}")) == rounded(example), template
        tried += 1
    assert tried == 5


def test_nothing_in_the_answers_is_not_json(web: Web) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    for path in ROUTES:
        json.loads(web.ask(path).body, parse_constant=refuse)
