"""Configuration: what is wrong is named with its key, and a secret stays one."""

import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, SecretStr

from bridge.config import Config, load
from bridge.errors import ConfigError, ExitCode

SECRET = "correct-horse-battery"
SHIPPED = Path(__file__).parents[2] / "config" / "wattbridge.toml"


@pytest.fixture(autouse=True)
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder and an environment that says nothing: only the test configures."""
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        if name.startswith("WATTBRIDGE_"):
            monkeypatch.delenv(name)


def write(text: str, name: str = "wattbridge.toml") -> Path:
    path = Path(name).absolute()
    path.write_text(text, encoding="utf-8")
    return path


def error_of(text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(write(text))
    assert caught.value.exit_code is ExitCode.USAGE
    return str(caught.value)


def leaves(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every key of the configuration that is not a section, with its value."""
    for name in type(model).model_fields:
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


# Where values come from


def test_without_file_and_environment_the_defaults_count() -> None:
    config = load()
    assert (config.mqtt.host, config.mqtt.port, config.mqtt.client_id) == ("localhost", 1883, "wattbridge")
    assert config.mqtt.session_expiry_s == 7 * 24 * 3600
    assert config.mqtt.receive_maximum == 20_000
    assert (config.batch.max_readings, config.batch.max_bytes, config.batch.max_age_ms) == (5_000, 4 * 1024 * 1024, 100)
    assert (config.limits.horizon_days, config.limits.max_future_s) == (366, 300)
    assert config.topics.telemetry == "energy/v1/{kind}/{device_id}/telemetry"
    assert config.database.dsn.get_secret_value() == ""
    assert not config.mqtt.tls.enabled


def test_the_window_of_the_defaults_holds_two_batches() -> None:
    config = load()
    assert config.mqtt.receive_maximum >= 2 * config.batch.max_readings


def test_a_file_goes_before_the_defaults() -> None:
    config = load(
        write('shutdown_deadline_s = 5\n[mqtt]\nhost = "broker"\n[mqtt.tls]\nenabled = true\n[log]\nlevel = "debug"')
    )
    assert (config.mqtt.host, config.mqtt.tls.enabled, config.log.level) == ("broker", True, "debug")
    assert config.shutdown_deadline_s == 5
    assert config.mqtt.port == 1883


def test_the_environment_goes_before_the_file_key_by_key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATTBRIDGE_MQTT__HOST", "from-environment")
    monkeypatch.setenv("WATTBRIDGE_MQTT__TLS__ENABLED", "true")
    monkeypatch.setenv("WATTBRIDGE_SHUTDOWN_DEADLINE_S", "7")
    config = load(
        write('shutdown_deadline_s = 5\n[mqtt]\nhost = "from-file"\nport = 1884\n[mqtt.tls]\nca_file = "/ca"')
    )
    assert (config.mqtt.host, config.mqtt.port, config.shutdown_deadline_s) == ("from-environment", 1884, 7)
    assert (config.mqtt.tls.enabled, config.mqtt.tls.ca_file) == (True, Path("/ca"))


def test_the_file_is_named_by_the_caller_then_by_a_variable_then_by_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    Path("config").mkdir()
    write('mqtt.host = "by-place"', "config/wattbridge.toml")
    assert load().mqtt.host == "by-place"
    named = write('mqtt.host = "by-variable"', "named.toml")
    monkeypatch.setenv("WATTBRIDGE_CONFIG", str(named))
    assert load().mqtt.host == "by-variable"
    assert load(write('mqtt.host = "by-caller"', "given.toml")).mqtt.host == "by-caller"


def test_a_configuration_does_not_change() -> None:
    config = load()
    with pytest.raises(ValueError, match="frozen"):
        config.mqtt.host = "other"  # type: ignore[misc]
    with pytest.raises(ValueError, match="frozen"):
        config.shutdown_deadline_s = 1  # type: ignore[misc]


def test_history_is_not_dropped_while_readings_for_it_are_still_taken() -> None:
    message = error_of("[maintenance]\nhistory_days = 366")
    assert message.startswith("maintenance (")
    assert "history_days is 366" in message
    assert "limits.horizon_days" in message
    assert "keep at least 367 days, or lower limits.horizon_days below 366" in message
    assert load(write("[maintenance]\nhistory_days = 367")).maintenance.history_days == 367
    short = load(write("[maintenance]\nhistory_days = 30\n[limits]\nhorizon_days = 29"))
    assert short.maintenance.history_days == 30


def test_history_days_are_judged_by_the_limits_of_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATTBRIDGE_LIMITS__HORIZON_DAYS", "30")
    assert "keep at least 31 days" in error_of("[maintenance]\nhistory_days = 30")


@pytest.mark.parametrize(
    ("listen", "address"),
    [
        ("127.0.0.1:9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),  # noqa: S104 - nothing listens
        ("[::1]:65535", ("::1", 65_535)),
        ("[::]:9464", ("::", 9464)),
        ("", None),
    ],
)
def test_where_to_listen_is_an_address_and_a_port(
    listen: str, address: tuple[str, int] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert load(write(f'[health]\nlisten = "{listen}"')).health.address() == address
    assert load(write("")).health.address() is None
    monkeypatch.setenv("WATTBRIDGE_HEALTH__LISTEN", listen)
    assert load(write("")).health.address() == address


@pytest.mark.parametrize(
    "listen",
    ["localhost:9464", "9464", ":9464", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:+1", "127.0.0.1:٣",
     "::1:9464", "[127.0.0.1]:9464", "[::1:9464", "[::1]", "256.0.0.1:9464", "http://127.0.0.1:9464", " "],
)  # fmt: skip
def test_what_is_no_address_is_named_with_one_that_would_be(listen: str) -> None:
    message = error_of(f'[health]\nlisten = "{listen}"')
    assert message.startswith("health.listen (")
    assert f"{listen!r} is not an IP address and a port" in message
    assert "127.0.0.1:9464" in message


def test_a_batch_that_waits_for_more_is_no_standstill() -> None:
    message = error_of("[health]\nstalled_after_s = 30\n[batch]\nmax_age_ms = 30000")
    assert message.startswith("health (")
    assert "stalled_after_s is 30" in message
    assert "batch.max_age_ms" in message
    long = load(write("[health]\nstalled_after_s = 30.1\n[batch]\nmax_age_ms = 30000"))
    assert long.health.stalled_after_s == 30.1


# Secrets


@pytest.mark.parametrize("listen", ["", "9465", "localhost:9465", "127.0.0.1:0"])
def test_the_read_api_listens_on_an_address_and_a_port(listen: str) -> None:
    assert load().web.address() == ("127.0.0.1", 9465)
    assert error_of(f'[web]\nlisten = "{listen}"').startswith("web.listen (")


@pytest.mark.parametrize(("listen", "is_open"), [("127.0.0.2:1", False), ("[::1]:1", False), ("[::]:1", True)])
def test_it_is_known_whether_others_can_reach_the_read_api(listen: str, is_open: bool) -> None:  # noqa: FBT001
    assert load(write(f'[web]\nlisten = "{listen}"')).web.open is is_open


@pytest.mark.parametrize("token", ["two words", "ä", "\\n"])
def test_a_token_that_fits_into_no_header_is_refused_and_not_shown(token: str) -> None:
    message = error_of(f'[web]\ntoken = "{token}"')
    assert message.startswith("web.token (")
    assert "printable ASCII" in message
    assert token not in message


def test_daemons_are_named_with_commas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATTBRIDGE_WEB__DAEMONS", " 127.0.0.1:9464, [::1]:9464,bridge-2:80 ")
    assert load().web.daemon_addresses == ("127.0.0.1:9464", "[::1]:9464", "bridge-2:80")
    for wrong in (
        "127.0.0.1",
        "http://bridge:9464",
        "bridge:9464/metrics",
        "bridge:9464 bridge:9465",
        '["bridge:9464"]',
    ):
        monkeypatch.setenv("WATTBRIDGE_WEB__DAEMONS", wrong)
        with pytest.raises(ConfigError, match=r"web\.daemons \(WATTBRIDGE_WEB__DAEMONS\): .* is not a host and a port"):
            load()


def test_replay_needs_a_token() -> None:
    assert "set web.token" in error_of('[web.replay]\ndsn = "postgresql://writer@db/x"')
    assert load(write('[web]\ntoken = "t"\n[web.replay]\ndsn = "postgresql://writer@db/x"')).web.replay.dsn


SECRETS = ["database.dsn", "database.password", "mqtt.password", "web.token"]


def secret_of(config: Config, key: str) -> str:
    section, name = key.split(".")
    secret = getattr(getattr(config, section), name)
    assert isinstance(secret, SecretStr)
    return secret.get_secret_value()


@pytest.mark.parametrize("key", SECRETS)
@pytest.mark.parametrize("ending", ["", "\n", "\r\n", "\n\n"])
def test_a_secret_can_come_from_a_file_with_or_without_a_line_ending(key: str, ending: str) -> None:
    Path("secret").write_bytes(f"{SECRET}{ending}".encode())
    assert secret_of(load(write(f'{key}_file = "secret"')), key) == SECRET


@pytest.mark.parametrize("key", SECRETS)
def test_a_variable_can_name_the_file_of_a_secret(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("secret").write_text(SECRET, encoding="utf-8")
    monkeypatch.setenv(f"WATTBRIDGE_{key.replace('.', '__').upper()}_FILE", "secret")
    assert secret_of(load(), key) == SECRET


@pytest.mark.parametrize("key", SECRETS)
def test_a_secret_can_come_from_a_variable(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"WATTBRIDGE_{key.replace('.', '__').upper()}", SECRET)
    assert secret_of(load(), key) == SECRET


@pytest.mark.parametrize("key", SECRETS)
def test_a_secret_file_that_cannot_be_read_is_named(key: str) -> None:
    Path("folder").mkdir()
    Path("binary").write_bytes(b"\xff\xfe")
    for path, why in (("missing", "No such file"), ("folder", "Is a directory"), ("binary", "UTF-8")):
        message = error_of(f'{key}_file = "{path}"')
        assert key.partition(".")[0] in message
        assert f"{key.partition('.')[2]}_file" in message
        assert path in message
        assert why in message


@pytest.mark.parametrize("key", SECRETS)
@pytest.mark.parametrize("value", ["5", "true", "['a']", "{a = 1}"])
def test_the_name_of_a_secret_file_must_be_a_text(key: str, value: str) -> None:
    message = error_of(f"{key}_file = {value}")
    assert f"{key.partition('.')[2]}_file" in message


@pytest.mark.parametrize("key", SECRETS)
def test_a_secret_and_its_file_are_one_too_many(key: str) -> None:
    Path("secret").write_text(SECRET, encoding="utf-8")
    section, name = key.split(".")
    message = error_of(f'[{section}]\n{name} = "{SECRET}"\n{name}_file = "secret"')
    assert section in message
    assert f"{name} and {name}_file are both set" in message
    assert SECRET not in message


@pytest.mark.parametrize("key", SECRETS)
def test_a_configuration_that_is_shown_shows_no_secret(key: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(f"WATTBRIDGE_{key.replace('.', '__').upper()}", SECRET)
    config = load()
    for shown in (repr(config), str(config), repr(config.model_dump()), config.model_dump_json()):
        assert SECRET not in shown


@pytest.mark.parametrize("key", SECRETS)
@pytest.mark.parametrize(
    "wrong",
    [
        "{key} = ['{secret}']",
        "{key} = [['{secret}']]",
        "{key} = {{ a = '{secret}' }}",
        "{key}.{secret_key} = '{secret}'",
        "{section} = '{secret}'",
        "{section} = ['{secret}']",
        "{section} = [{{ {name} = '{secret}' }}]",
        "[[{section}]]\n{name} = '{secret}'",
        "{key} = '{secret}'\n{section}.wrong = 1",
        "{key} = '{secret}'\n{section}.{name}_file = 'missing'",
        "{key}s = '{secret}'",
        "{section}s.{name} = '{secret}'",
        "{name} = '{secret}'",
        "{key} = '{secret}'\nmqtt.port = 0\ndatabase.statement_timeout_s = -1",
        "{key} = '{secret}'\nmqtt.tls.ca_file = 'x'",
        "{key} = '{secret}'\nmqtt.tls = '{secret}'",
        "{key} = '{secret}",
        "{key} = {secret}",
        "{key} = '{secret}' x",
        "{key} = '{secret}'\n{key} = '{secret}'",
        '{key} = "{secret}\\q"',
        "{key} = '''{secret}",
    ],
)
def test_no_error_in_a_file_shows_a_secret(key: str, wrong: str) -> None:
    section, name = key.split(".")
    text = wrong.format(key=key, section=section, name=name, secret=SECRET, secret_key="a")
    assert SECRET not in error_of(text)


@pytest.mark.parametrize("key", SECRETS)
@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("{section}", "{secret}"),
        ("{section}", '"{secret}"'),
        ("{section}", '["{secret}"]'),
        ("{section}", '{{"{name}": "{secret}"'),
        ("{section}", '{{"{name}": ["{secret}"]}}'),
        ("{section}", '{{"{name}s": "{secret}"}}'),
        ("{section}__{name}s", "{secret}"),
        ("{section}__{name}__x", "{secret}"),
        ("{name}", "{secret}"),
    ],
)
def test_no_error_in_a_variable_shows_a_secret(
    key: str, variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, name = key.split(".")
    names = {"section": section, "name": name, "secret": SECRET}
    monkeypatch.setenv("WATTBRIDGE_" + variable.format(**names).upper(), value.format(**names))
    with pytest.raises(ConfigError) as caught:
        load()
    assert section in str(caught.value).lower() or name in str(caught.value).lower()
    assert SECRET not in str(caught.value)


# What is wrong


@pytest.mark.parametrize(
    ("text", "key", "meant"),
    [
        ("[mqtt]\nhots = 'x'", "mqtt.hots", "mqtt.host"),
        ("[mqtt.tls]\nenabeld = true", "mqtt.tls.enabeld", "mqtt.tls.enabled"),
        ("[databse]\ndsn = 'x'", "databse", "database"),
        ("shutdown_deadline = 5", "shutdown_deadline", "shutdown_deadline_s"),
        ("[limits]\nmax_volts = 5", "limits.max_volts", "limits.max_voltage"),
        ("[batch]\nmax_reading = 5", "batch.max_reading", "batch.max_readings"),
    ],
)
def test_an_unknown_key_is_an_error_that_names_the_nearest_known_one(text: str, key: str, meant: str) -> None:
    message = error_of(text)
    assert message.startswith(f"{key} (")
    assert "unknown key" in message
    assert f"did you mean {meant}?" in message
    assert str(Path("wattbridge.toml").absolute()) in message


@pytest.mark.parametrize("key", ["_env_prefix", "_secrets_dir", "_cli_parse_args", "__pydantic_self__", "self", "Mqtt"])
def test_no_key_of_a_file_reaches_what_the_library_takes_besides(key: str) -> None:
    message = error_of(f"{key} = 'x'")
    assert key in message
    assert "unknown key" in message


@pytest.mark.parametrize(
    ("variable", "meant"),
    [
        ("WATTBRIDGE_MQTT__HOTS", "WATTBRIDGE_MQTT__HOST"),
        ("WATTBRIDGE_MQTT_HOST", "WATTBRIDGE_MQTT__HOST"),
        ("WATTBRIDGE_DATABASE__DNS", "WATTBRIDGE_DATABASE__DSN"),
        ("WATTBRIDGE_CONFIG_FILE", ""),
        ("WATTBRIDGE_CONFIGURATION", ""),
        ("WATTBRIDGE_X", ""),
    ],
)
def test_an_unknown_variable_is_an_error_that_names_the_nearest_known_one(
    variable: str, meant: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, "some value")
    with pytest.raises(ConfigError) as caught:
        load()
    message = str(caught.value)
    assert message.startswith(f"{variable}: unknown variable")
    assert f"did you mean {meant}" in message or not meant
    assert "some value" not in message


def test_variables_of_others_and_the_name_of_the_file_are_not_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATTBRIDGE_SIMULATOR_HOST", "broker.example")
    monkeypatch.setenv("WATTBRIDGE_TEST_SERVICES", "docker")
    monkeypatch.setenv("WATTBRIDGE_TEST_DSN", "x")
    monkeypatch.setenv("WATTBRIDGE_CONFIG", str(write("")))
    monkeypatch.setenv("WATTBRIDG", "x")
    monkeypatch.setenv("PATH_WATTBRIDGE_X", "x")
    assert load().mqtt.host == "localhost"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[mqtt]\nport = 0", ["mqtt.port", "0", "greater than or equal to 1"]),
        ("[mqtt]\nport = 65536", ["mqtt.port", "65536", "less than or equal to 65535"]),
        ("[mqtt]\nport = 'x'", ["mqtt.port", "'x'", "integer"]),
        ("[mqtt]\nhost = ''", ["mqtt.host", "''", "at least 1 character"]),
        ("[mqtt]\nhost = 5", ["mqtt.host", "5", "string"]),
        ("[mqtt]\nclient_id = 'a b'", ["mqtt.client_id", "'a b'", "pattern"]),
        ("[mqtt]\nshare_group = 'a/b'", ["mqtt.share_group", "'a/b'", "pattern"]),
        ("[mqtt]\nreceive_maximum = 70000", ["mqtt.receive_maximum", "70000", "65535"]),
        ("[log]\nlevel = 'loud'", ["log.level", "'loud'", "'debug', 'info', 'warning' or 'error'"]),
        ("[batch]\nmax_age_ms = 0", ["batch.max_age_ms", "0", "greater than or equal to 1"]),
        ("[limits]\nhorizon_days = 0", ["limits.horizon_days", "0", "greater than or equal to 1"]),
        ("shutdown_deadline_s = 0", ["shutdown_deadline_s", "0", "greater than 0"]),
        ("shutdown_deadline_s = nan", ["shutdown_deadline_s", "nan"]),
        ("[database]\nstatement_timeout_s = inf", ["database.statement_timeout_s", "inf"]),
        ("[health]\nstalled_after_s = 0", ["health.stalled_after_s", "0", "greater than 0"]),
        ("[health]\nlisten = 9464", ["health.listen", "9464", "string"]),
        ("[mqtt]\nconnect_timeout_s = inf", ["mqtt.connect_timeout_s", "inf"]),
        ("mqtt = 5", ["mqtt"]),
        ("[topics]\ntelemetry = 'a/{kind}'", ["topics", "'a/{kind}'", "{device_id} exactly once"]),
        ("[topics]\nstatus = 'a/#/{kind}/{device_id}'", ["topics", "wildcards"]),
        ("[topics]\ntelemetry = 'a/{kind}/{device_id}'\nstatus = 'a/{kind}/{device_id}'", ["topics", "differ"]),
        ("[topics]\nbridge_status = 'a/+'", ["topics", "bridge_status", "wildcards"]),
        ("[mqtt.tls]\nenabled = true\ncert_file = 'c'", ["mqtt.tls", "cert_file and key_file go together"]),
        ("[mqtt.tls]\nca_file = 'c'", ["mqtt.tls", "tls.enabled is false"]),
    ],
)
def test_a_wrong_value_is_named_with_its_key_and_what_is_allowed(text: str, told: list[str]) -> None:
    message = error_of(text)
    assert message.startswith(told[0])
    assert [part for part in told if part not in message] == []
    assert len(message.splitlines()) == 1


def test_a_wrong_variable_is_named_with_its_key_and_not_blamed_on_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATTBRIDGE_MQTT__PORT", "abc")
    message = error_of("[mqtt]\nhost = 'x'")
    assert message.startswith("mqtt.port (")
    assert "'abc'" in message
    assert "integer" in message
    assert "wattbridge.toml" not in message


@pytest.mark.parametrize("variable", ["WATTBRIDGE_MQTT__TLS", "WATTBRIDGE_MQTT", "WATTBRIDGE_LIMITS"])
@pytest.mark.parametrize("value", ["{", "yes", "1883", "[]", ""])
def test_a_section_in_a_variable_that_is_not_one_is_an_error(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError):
        load()


def test_every_problem_has_a_line() -> None:
    lines = error_of("[mqtt]\nport = 0\nhots = 'x'\n[log]\nlevel = 'loud'").splitlines()
    assert sorted(line.partition(" ")[0] for line in lines) == ["log.level", "mqtt.hots", "mqtt.port"]


@pytest.mark.parametrize("text", ["[mqtt", "mqtt.host = ", "a = 1\na = 2", "host: x", "\0"])
def test_what_is_not_toml_is_named_with_its_place(text: str) -> None:
    message = error_of(text)
    assert "wattbridge.toml is not valid TOML" in message
    assert re.search(r"at (line \d+|end of document)", message)


def test_a_file_that_cannot_be_read_is_named() -> None:
    Path("folder").mkdir()
    Path("binary").write_bytes(b"\xff\xfe")
    for name in ("missing.toml", "folder", "binary"):
        with pytest.raises(ConfigError, match=f"cannot read the configuration file .*{name}"):
            load(Path(name))


def test_a_file_that_a_variable_names_must_exist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WATTBRIDGE_CONFIG", "missing.toml")
    with pytest.raises(ConfigError, match=r"missing\.toml"):
        load()


# The file that is shipped


def uncommented(text: str) -> str:
    return re.sub(r"^# ?(\w+ = )", r"\1", text, flags=re.MULTILINE)


def test_the_shipped_file_says_what_the_defaults_are() -> None:
    assert load(SHIPPED) == load()


def test_every_key_of_the_shipped_file_is_known_and_every_known_key_is_in_it() -> None:
    def keys(table: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
        for name, value in table.items():
            if isinstance(value, dict):
                yield from keys(value, f"{prefix}{name}.")
            else:
                yield f"{prefix}{name}", value

    shown = dict(keys(tomllib.loads(uncommented(SHIPPED.read_text(encoding="utf-8")))))
    known = dict(leaves(load()))
    assert set(shown) == set(known)
    for key, default in known.items():
        if default is not None:  # else the value is an example: there is no null in TOML
            plain = default.get_secret_value() if isinstance(default, SecretStr) else default
            assert (key, shown[key]) == (key, plain)


def test_the_examples_of_the_shipped_file_are_valid() -> None:
    text = uncommented(SHIPPED.read_text(encoding="utf-8"))
    text = re.sub(r"^(dsn|password|token)_file = .*$", "", text, flags=re.MULTILINE)
    assert load(write(text.replace("enabled = false", "enabled = true"))).mqtt.tls.enabled


def test_every_key_has_a_description() -> None:
    def undescribed(model: BaseModel) -> Iterator[str]:
        for name, field in type(model).model_fields.items():
            value = getattr(model, name)
            if isinstance(value, BaseModel):
                yield from undescribed(value)
            elif not field.description:
                yield name

    assert list(undescribed(load())) == []
