"""What the answers look like, for the OpenAPI document and as the columns of CSV; the rows come from SQL as they are.

Energies are kWh, states of charge percent, temperatures degrees Celsius, times RFC 3339 in UTC.
"""

from datetime import date, datetime
from typing import Generic, TypeVar

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

Item = TypeVar("Item")


class _Answer(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="forbid")


class Listed(BaseModel, Generic[Item]):
    """Part of a list."""

    model_config = ConfigDict(extra="forbid")

    items: list[Item]
    next: str | None = Field(description="Where the list goes on, as in the header Link; null: here it ends.")


class VehiclePerformance(_Answer):
    """How efficiently a vehicle charged: DC over AC of the minutes in which it alone reported from a meter."""

    vehicle_id: str
    time_window_hours: float = Field(description="Length of the window.")
    since: datetime = Field(description="Start of the window.")
    until: datetime | None = Field(description="End of the window, not included; null: it has none.")
    total_ac_consumed_kwh: float = Field(description="AC energy of the matched minutes, by the meters.")
    total_dc_delivered_kwh: float = Field(description="DC energy of the matched minutes, by the vehicle.")
    charging_efficiency: float | None = Field(description="DC over AC; null where it means nothing, see reason.")
    reason: str | None = Field(description="Why there is no efficiency.")
    loss_kwh: float | None = Field(description="AC less DC; null with the efficiency.")
    unattributed_dc_kwh: float = Field(description="DC energy outside of matched minutes.")
    average_soc: float = Field(description="Mean over its readings.")
    last_soc: float = Field(description="Of its newest reading in the window.")
    average_battery_temp: float = Field(description="Mean over its readings.")
    max_battery_temp: float = Field(description="Highest of its readings.")
    matched_minutes: int = Field(description="Minutes in which it alone reported from a meter, and the meter as well.")
    readings: int = Field(description="Its readings in the window.")
    meters: list[str] = Field(description="Where it was plugged in.")


class FleetSummary(_Answer):
    """The whole fleet. Totals need no mapping of vehicles to meters."""

    time_window_hours: float = Field(description="Length of the window.")
    since: datetime = Field(description="Start of the window.")
    until: datetime = Field(description="End of the window, not included.")
    meters_reporting: int = Field(description="Meters with readings in the window.")
    vehicles_reporting: int = Field(description="Vehicles with readings in the window.")
    total_ac_consumed_kwh: float = Field(description="AC energy of all meters.")
    total_dc_delivered_kwh: float = Field(description="DC energy of all vehicles.")
    charging_efficiency: float | None = Field(description="DC over AC; null where it means nothing, see reason.")
    reason: str | None = Field(description="Why there is no efficiency.")
    loss_kwh: float | None = Field(description="AC less DC; null with the efficiency.")
    unattributed_ac_kwh: float = Field(description="AC energy outside of matched minutes.")
    unattributed_dc_kwh: float = Field(description="DC energy outside of matched minutes.")


class InefficientVehicle(_Answer):
    """A vehicle that lost too much in 24 hours of closed quarter hours, or has more DC than AC."""

    vehicle_id: str
    finding: str = Field(description="inefficient, or mapping or metering fault.")
    charging_efficiency: float | None = Field(description="DC over AC; null above 1.")
    ratio: float = Field(description="DC over AC, whatever it is.")
    total_ac_consumed_kwh: float = Field(description="AC energy of the matched minutes, by the meters.")
    total_dc_delivered_kwh: float = Field(description="DC energy of the matched minutes, by the vehicle.")
    loss_kwh: float | None = Field(description="AC less DC; null with the efficiency.")
    meters: list[str] = Field(description="Where it charged; a faulty charger recurs.")
    since: datetime = Field(description="Start of the window.")
    until: datetime = Field(description="End of the window, not included.")


class Charger(_Answer):
    """How efficiently vehicles charged at a meter."""

    meter_id: str
    finding: str | None = Field(
        description="inefficient, mapping or metering fault; null: nothing, or too little energy."
    )
    charging_efficiency: float | None = Field(description="DC over AC; null where it means nothing, see reason.")
    reason: str | None = Field(description="Why there is no efficiency.")
    total_ac_consumed_kwh: float = Field(description="AC energy of the matched minutes, by the meter.")
    total_dc_delivered_kwh: float = Field(description="DC energy of the matched minutes, by the vehicles.")
    loss_kwh: float | None = Field(description="AC less DC; null with the efficiency.")
    unattributed_ac_kwh: float = Field(description="AC energy outside of matched minutes.")
    matched_minutes: int = Field(description="Minutes in which one vehicle alone reported from it, and it as well.")
    readings: int = Field(description="Its readings in the window.")
    vehicles: list[str] = Field(description="Which were plugged in.")
    since: datetime = Field(description="Start of the window.")
    until: datetime = Field(description="End of the window, not included.")


class Session(_Answer):
    """A charging session, whole even where it began before the window."""

    vehicle_id: str
    meter_id: str
    started: datetime = Field(description="The first reading there.")
    ended: datetime = Field(description="The last reading there; the vehicle may be still there.")
    ac_consumed_kwh: float = Field(description="AC energy of the matched minutes.")
    dc_delivered_kwh: float = Field(description="DC energy of all its readings there.")
    charging_efficiency: float | None = Field(description="DC over AC of the matched minutes; null: see reason.")
    reason: str | None = Field(description="Why there is no efficiency.")
    mean_kw: float = Field(description="Mean power into the battery, in kW DC.")
    peak_kw: float = Field(description="Power of the best minute, in kW DC.")
    soc_from: float = Field(description="Of the first reading.")
    soc_to: float = Field(description="Of the last reading.")
    matched_minutes: int
    readings: int


class Energy(_Answer):
    """The energy of one bucket of time. A bucket without readings is absent."""

    day: date | None = Field(description="The day in analytics_setting.time_zone; null with other resolutions.")
    starts: datetime = Field(description="Start of the bucket.")
    readings_ac: int | None = Field(description="Readings of meters; null where they were not asked for.")
    ac_consumed_kwh: float | None = Field(description="AC energy; null where there are no readings.")
    readings_dc: int | None = Field(description="Readings of vehicles; null where they were not asked for.")
    dc_delivered_kwh: float | None = Field(description="DC energy; null where there are no readings.")


class VehicleStatus(_Answer):
    """What a vehicle is doing now, by its newest reading and its status topic."""

    vehicle_id: str
    timestamp: datetime = Field(description="End of the interval of the newest reading.")
    online: bool | None = Field(description="What its status topic last said; null: never anything.")
    charging: bool = Field(description="Whether energy reached the battery in the newest interval.")
    soc: float
    kwh_delivered_dc: float = Field(description="DC energy of the newest interval.")
    battery_temp: float
    meter_id: str | None = Field(description="Where it is plugged in; null where the reading names no meter.")
    received_at: datetime = Field(description="When the bridge received the newest reading.")


class MeterStatus(_Answer):
    """What a meter is doing now, by its newest reading and its status topic."""

    meter_id: str
    timestamp: datetime = Field(description="End of the interval of the newest reading.")
    online: bool | None = Field(description="What its status topic last said; null: never anything.")
    charging: bool = Field(description="Whether the newest interval drew energy.")
    kwh_consumed_ac: float = Field(description="AC energy of the newest interval.")
    voltage: float
    received_at: datetime = Field(description="When the bridge received the newest reading.")


class SilentDevice(_Answer):
    """A device from which nothing new came for analytics_setting.silent_after reading intervals."""

    kind: str = Field(description="meter or vehicle.")
    device_id: str
    timestamp: datetime = Field(description="End of the interval of the newest reading.")
    received_at: datetime = Field(description="When the bridge received it: since then it is silent.")
    missed_readings: int = Field(description="How many reading intervals have passed since then.")
    online: bool | None = Field(description="What its status topic last said; null: never anything.")


class Ingest(_Answer):
    """What became of every reading, by daemon: received = stored + duplicate + deadLettered."""

    instance: str = Field(description="The daemon, by its MQTT client id.")
    received: int
    stored: int
    duplicate: int
    dead_lettered: int
    presence: int = Field(description="Status messages taken; counted apart.")
    updated_at: datetime = Field(description="When the last batch was committed.")


class DeadLetters(_Answer):
    """Dead letters with one reason."""

    reason: str = Field(description="Stable reason code.")
    letters: int
    devices: int = Field(description="Different device ids in their topics.")
    first_received: datetime
    last_received: datetime
    example_topic: str = Field(description="The topic of the newest of them.")
    example_detail: str = Field(description="Its reason for a person to read.")
