"""Configuration: a TOML file, overridden by WATTBRIDGE_ variables. The only module that reads files and environment."""

import difflib
import ipaddress
import os
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from bridge.errors import ConfigError
from bridge.messages import Limits
from bridge.topics import Topics, check_template

PREFIX = "WATTBRIDGE_"
# Variables with our prefix that are no keys of the configuration: the file to read, what simulator and tests are told.
FILE_VARIABLE = "WATTBRIDGE_CONFIG"
OTHERS_PREFIXES = ("WATTBRIDGE_SIMULATOR_", "WATTBRIDGE_TEST_")
DEFAULT_FILE = Path("config/wattbridge.toml")

PORTS = range(1, 65_536)

Seconds = Annotated[float, Field(gt=0, le=86_400)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True)

    @model_validator(mode="before")
    @classmethod
    def _read_secret_files(cls, values: Any) -> Any:  # noqa: ANN401 - whatever the file has there
        """Fills `key` from the file named by `key_file`, as Docker and systemd hand over secrets."""
        if not isinstance(values, dict):
            return values
        for name in cls.model_fields:
            path = values.get(f"{name}_file")
            if path and f"{name}_file" in cls.model_fields:
                if not isinstance(path, str | Path):
                    raise ValueError(f"{name}_file: must be the path of a file, in quotes")
                if values.get(name):
                    raise ValueError(f"{name} and {name}_file are both set; leave one out")
                try:
                    values = values | {name: Path(path).read_text(encoding="utf-8").strip()}
                except (OSError, UnicodeDecodeError) as error:
                    # Somebody may have put the secret itself there.
                    shown = "the file" if {"=", ":"} & set(str(path)) else path
                    why = getattr(error, "strerror", None) or "it is not text in UTF-8"
                    raise ValueError(f"{name}_file: cannot read {shown}: {why}") from None
        return values


class Database(_Section):
    """Where PostgreSQL is."""

    dsn: SecretStr = Field(
        SecretStr(""),
        description="postgresql://user:password@host:port/database, or key=value; empty: libpq's PG… variables",
    )
    dsn_file: Path | None = Field(None, description="file that holds the DSN")
    password: SecretStr = Field(SecretStr(""), description="password, where the DSN has none")
    password_file: Path | None = Field(None, description="file that holds the password")
    statement_timeout_s: Seconds = Field(60, description="longest single statement before it is given up and retried")


class Tls(_Section):
    """TLS towards the broker."""

    enabled: bool = Field(False, description="speak TLS")
    ca_file: Path | None = Field(None, description="CA certificates to trust; empty: the system's")
    cert_file: Path | None = Field(None, description="client certificate (PEM), for mutual TLS")
    key_file: Path | None = Field(None, description="its private key (PEM)")

    @model_validator(mode="after")
    def _whole(self) -> "Tls":
        if (self.cert_file is None) != (self.key_file is None):
            raise ValueError("cert_file and key_file go together")
        if not self.enabled and (self.ca_file or self.cert_file):
            raise ValueError("ca_file or cert_file is set, but tls.enabled is false")
        return self


class Mqtt(_Section):
    """Where the broker is and how to speak with it."""

    host: str = Field("localhost", min_length=1, description="the broker's name or address")
    port: int = Field(1883, ge=1, le=65_535, description="the broker's port; 8883 is usual for TLS")
    client_id: str = Field(
        "wattbridge", min_length=1, max_length=128, pattern=r"^[A-Za-z0-9._:-]+$",
        description="names the persistent session; each daemon needs its own",
    )  # fmt: skip
    username: str | None = Field(None, max_length=10_000, description="user name at the broker")
    password: SecretStr = Field(SecretStr(""), max_length=10_000, description="password at the broker")
    password_file: Path | None = Field(None, description="file that holds the password")
    tls: Tls = Tls()
    keep_alive_s: int = Field(30, ge=5, le=65_535, description="a ping at least this often")
    connect_timeout_s: Seconds = Field(10, description="longest wait for the broker's answer")
    session_expiry_s: int = Field(
        7 * 86_400, ge=0, le=0xFFFF_FFFF, description="how long the broker keeps our messages while we are away"
    )
    receive_maximum: int = Field(20_000, ge=1, le=65_535, description="window: most messages not yet acknowledged")
    max_packet_size: int = Field(
        4 * 1024 * 1024,
        ge=1024,
        le=0xFFFF_FFFF,
        description="largest packet, bytes; the broker discards what is larger",
    )
    max_outstanding_bytes: int = Field(
        128 * 1024 * 1024, ge=1024 * 1024, description="payload bytes not yet committed before reading pauses"
    )
    share_group: str | None = Field(
        None, pattern=r"^[^/+#\s]+$", description="share the telemetry with the other daemons of this group"
    )


class TopicTemplates(_Section):
    """Which topics the devices publish to."""

    telemetry: str = Field("energy/v1/{kind}/{device_id}/telemetry", description="readings")
    status: str = Field("energy/v1/{kind}/{device_id}/status", description="online or offline, retained")
    bridge_status: str = Field("energy/v1/bridge/{client_id}/status", description="the bridge's own, and its last will")

    @model_validator(mode="after")
    def _usable(self) -> "TopicTemplates":
        check_template(self.telemetry)
        check_template(self.status)
        self.topics()
        if set(self.bridge_status) & set("+#\0"):
            raise ValueError("bridge_status must not have wildcards")
        return self

    def topics(self) -> Topics:
        """The parser and maker of topics that these templates describe."""
        return Topics(self.telemetry, self.status)


class BatchLimits(_Section):
    """When a batch is written: the first of these that is reached."""

    max_readings: int = Field(5_000, ge=1, le=100_000, description="readings")
    max_bytes: int = Field(4 * 1024 * 1024, ge=1024, description="payload bytes")
    max_age_ms: int = Field(100, ge=1, le=60_000, description="age of its first reading, milliseconds")


class Maintenance(_Section):
    """What the daemon does beside the data path."""

    every_s: Seconds = Field(20, description="how often partitions, rollups and retention are looked after")
    partitions_ahead_days: int = Field(2, ge=0, le=366, description="days after today whose partitions are made ahead")
    history_days: int | None = Field(
        None, ge=1, le=36_600, description="days of history that are kept; rollups stay; empty: all of it"
    )


def _address(text: str) -> tuple[str, int] | None:
    """Address and port of `address:port`, an IPv6 address in brackets; None where it is not that."""
    host, _, port = text.rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        wants_brackets = isinstance(ipaddress.ip_address(bare), ipaddress.IPv6Address)
    except ValueError:
        return None
    if wants_brackets != (bare != host) or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) not in PORTS:
        return None
    return bare, int(port)


def _listed(text: str) -> tuple[str, ...]:
    """What stands between commas."""
    return tuple(part for piece in text.split(",") if (part := piece.strip()))


def _usable_address(listen: str | None) -> str | None:
    """Raises ValueError where it cannot be listened on; empty where a section lets it be so: nowhere."""
    if listen and _address(listen) is None:
        raise ValueError(
            f"{listen!r} is not an IP address and a port; write it like 127.0.0.1:9464, 0.0.0.0:9464 or [::1]:9464"
        )
    return listen


class Health(_Section):
    """How others learn whether the bridge does its work."""

    stalled_after_s: Seconds = Field(
        60, description="nothing committed for so long, although something is held, is a standstill"
    )
    listen: str | None = Field(
        None,
        description="address and port of /livez, /readyz and /metrics, such as 127.0.0.1:9464; empty: none",
    )

    _check_listen = field_validator("listen")(_usable_address)

    def address(self) -> tuple[str, int] | None:
        """Where to listen; None: nowhere."""
        return _address(self.listen) if self.listen else None


class Replay(Database):
    """The login that gives dead letters a second chance, for those who look at them; without one nobody can."""

    dsn: SecretStr = Field(SecretStr(""), description="of a login with wattbridge_writer; empty: no replay")


class Web(_Section):
    """Pages and read API of `wattbridge web`, a process of its own."""

    listen: str = Field("127.0.0.1:9465", min_length=1, description="address and port, such as 127.0.0.1:9465")
    token: SecretStr = Field(
        SecretStr(""), description="what requests must send as `Authorization: Bearer …`; empty: nothing"
    )
    token_file: Path | None = Field(None, description="file that holds the token")
    connections: int = Field(4, ge=1, le=100, description="connections to the database")
    timeout_s: Seconds = Field(10, description="longest question to the database before it is given up")
    tariff: float | None = Field(
        None, ge=0, allow_inf_nan=False, description="what a kWh costs, to show losses as money; empty: none is shown"
    )
    currency: str = Field("EUR", min_length=1, max_length=8, description="of the tariff, as it is shown")
    daemons: str = Field(
        "", description="health.listen of daemons whose rates are shown, with commas: 127.0.0.1:9464, bridge:9464"
    )
    replay: Replay = Replay()

    _check_listen = field_validator("listen")(_usable_address)

    @field_validator("daemons")
    @classmethod
    def _check_daemons(cls, daemons: str) -> str:
        for daemon in _listed(daemons):
            if not re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+):[0-9]{1,5}", daemon):
                raise ValueError(f"{daemon!r} is not a host and a port; write it like 127.0.0.1:9464 or bridge:9464")
        return daemons

    @field_validator("replay")
    @classmethod
    def _replay_needs_a_token(cls, replay: Replay, info: ValidationInfo) -> Replay:
        token = info.data.get("token")
        if replay.dsn.get_secret_value() and token is not None and not token.get_secret_value():
            raise ValueError("replay writes: set web.token, so that not everybody who reaches the page can do it")
        return replay

    @field_validator("token")
    @classmethod
    def _fits_into_a_header(cls, token: SecretStr) -> SecretStr:
        if not re.fullmatch(r"[!-~]*", token.get_secret_value()):
            raise ValueError("(masked) must be printable ASCII without blanks, to be sent in a header")
        return token

    def address(self) -> tuple[str, int]:
        """Where to listen."""
        address = _address(self.listen)
        if address is None:
            raise AssertionError
        return address

    @property
    def daemon_addresses(self) -> tuple[str, ...]:
        """Host and port of each daemon."""
        return _listed(self.daemons)

    @property
    def open(self) -> bool:
        """Whether others than this machine can reach it."""
        return not ipaddress.ip_address(self.address()[0]).is_loopback


class Log(_Section):
    """What is said while running."""

    level: Literal["debug", "info", "warning", "error"] = Field("info", description="least severity that is logged")
    format: Literal["auto", "console", "json"] = Field("auto", description="auto: console on a terminal, else JSON")
    report_every_s: Seconds = Field(60, description="how often the counters are logged")


class Config(BaseSettings):
    """The whole configuration. Variables are named like WATTBRIDGE_MQTT__HOST."""

    model_config = SettingsConfigDict(
        extra="forbid", frozen=True, env_prefix=PREFIX, env_nested_delimiter="__", validate_default=True
    )

    database: Database = Database()
    mqtt: Mqtt = Mqtt()
    topics: TopicTemplates = TopicTemplates()
    batch: BatchLimits = BatchLimits()
    limits: Limits = Limits()
    # After the limits, which its check needs.
    maintenance: Maintenance = Maintenance()
    # After the batch, which its check needs.
    health: Health = Health()
    web: Web = Web()
    log: Log = Log()
    shutdown_deadline_s: Seconds = Field(20, description="longest time to finish the last batches when told to stop")

    @field_validator("maintenance")
    @classmethod
    def _keep_what_may_still_come(cls, maintenance: Maintenance, info: ValidationInfo) -> Maintenance:
        limits = info.data.get("limits")
        kept = maintenance.history_days
        if kept is not None and limits is not None and kept <= limits.horizon_days:
            raise ValueError(
                f"history_days is {kept}, but readings up to {limits.horizon_days} days old are still taken "
                f"(limits.horizon_days), for days that would have been dropped: keep at least "
                f"{limits.horizon_days + 1} days, or lower limits.horizon_days below {kept}"
            )
        return maintenance

    @field_validator("health")
    @classmethod
    def _let_a_batch_come_of_age(cls, health: Health, info: ValidationInfo) -> Health:
        batch = info.data.get("batch")
        if batch is not None and health.stalled_after_s * 1_000 <= batch.max_age_ms:
            raise ValueError(
                f"stalled_after_s is {health.stalled_after_s:g}, but a batch may wait {batch.max_age_ms} ms for more "
                "readings (batch.max_age_ms): that is no standstill; make stalled_after_s longer"
            )
        return health

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the signature is pydantic's
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """The environment goes before the file, which comes in as arguments."""
        return env_settings, init_settings


def load(path: Path | None = None) -> Config:
    """The configuration from `path` (default: $WATTBRIDGE_CONFIG, then config/wattbridge.toml if it exists).

    Variables of the environment go before it. Raises ConfigError with one line for each problem: the key, what it
    is (secrets masked), what is allowed.
    """
    if path is None:
        named = os.environ.get(FILE_VARIABLE)
        path = Path(named) if named else (DEFAULT_FILE if DEFAULT_FILE.exists() else None)
    keys = list(_keys(Config))
    if unknown := list(_unknown_variables(keys)):
        raise ConfigError("\n".join(unknown))
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the configuration file {path}: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None
    # Not left to the model: as arguments, some names would mean something else to it.
    if unknown := [
        f"{key} ({path}): unknown key{_nearest(key, [*Config.model_fields])}"
        for key in values
        if key not in Config.model_fields
    ]:
        raise ConfigError("\n".join(unknown))
    try:
        return Config(**values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(error, keys, path))) from None


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Every key of the configuration that has a value: `mqtt.host`, `mqtt.tls.enabled` and so on."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _keys(field.annotation, f"{prefix}{name}.")
        else:
            yield prefix + name


def _variable(key: str) -> str:
    """The variable that overrides a key."""
    return PREFIX + key.replace(".", "__").upper()


def _unknown_variables(keys: list[str]) -> Iterator[str]:
    """A line for each variable with our prefix that overrides nothing."""
    known = [_variable(key).removeprefix(PREFIX) for key in keys]
    for name in os.environ:
        if not name.startswith(PREFIX) or name == FILE_VARIABLE or name.startswith(OTHERS_PREFIXES):
            continue
        if (key := name.removeprefix(PREFIX)) not in known:
            yield f"{name}: unknown variable{_nearest(key, known, PREFIX)}"


def _explain(error: ValidationError, keys: list[str], path: Path | None) -> Iterator[str]:
    for problem in error.errors(include_url=False):
        key = ".".join(str(part) for part in problem["loc"])
        overridden = _variable(key) in os.environ
        where = f"{key} ({_variable(key) if overridden else path or 'environment'})"
        if problem["type"] == "extra_forbidden":
            yield f"{where}: unknown key{_nearest(key, keys)}"
        elif problem["type"] == "model_type":
            yield f"{where} is a section of keys: {', '.join(name for name in keys if name.startswith(f'{key}.'))}"
        else:
            value = "" if problem["type"] == "value_error" else f" is {_shown(key, problem['input'])}"
            yield f"{where}{value}: {problem['msg'].removeprefix('Value error, ')}"


def _shown(key: str, value: object) -> str:
    secret = key.rpartition(".")[2] in ("dsn", "password", "token")
    return "(masked)" if secret else repr(value)


def _nearest(name: str, known: list[str], prefix: str = "") -> str:
    matches = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"; did you mean {prefix}{matches[0]}?" if matches else f"; known are {', '.join(known)}"
