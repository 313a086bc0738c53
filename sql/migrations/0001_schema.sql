-- The tables of the bridge. Every key starts with the device, so that tables can be distributed by it later.

CREATE TABLE meter_history (
    meter_id        text             NOT NULL,
    ts              timestamptz      NOT NULL,
    kwh_ac          double precision NOT NULL,
    voltage         double precision NOT NULL,
    received_at     timestamptz      NOT NULL,
    ts_from_arrival boolean          NOT NULL,
    PRIMARY KEY (meter_id, ts)
) PARTITION BY RANGE (ts);

COMMENT ON TABLE meter_history IS
    'Every reading of every meter, append-only: an audit trail. One partition a day (UTC). (meter_id, ts) identifies a reading.';
COMMENT ON COLUMN meter_history.meter_id IS 'The meter, as named in the topic it published to.';
COMMENT ON COLUMN meter_history.ts IS 'End of the interval, by the meter''s clock (or the arrival, see ts_from_arrival).';
COMMENT ON COLUMN meter_history.kwh_ac IS 'Interval energy: AC energy consumed since the previous reading, in kWh.';
COMMENT ON COLUMN meter_history.voltage IS 'Voltage at the end of the interval, in V.';
COMMENT ON COLUMN meter_history.received_at IS 'When the bridge received the reading.';
COMMENT ON COLUMN meter_history.ts_from_arrival IS 'True where the reading had no timestamp and ts is the time of arrival.';

CREATE TABLE vehicle_history (
    vehicle_id      text             NOT NULL,
    ts              timestamptz      NOT NULL,
    kwh_dc          double precision NOT NULL,
    soc             double precision NOT NULL,
    battery_temp    double precision NOT NULL,
    meter_id        text,
    received_at     timestamptz      NOT NULL,
    ts_from_arrival boolean          NOT NULL,
    PRIMARY KEY (vehicle_id, ts)
) PARTITION BY RANGE (ts);

COMMENT ON TABLE vehicle_history IS
    'Every reading of every vehicle, append-only: an audit trail. One partition a day (UTC). (vehicle_id, ts) identifies a reading.';
COMMENT ON COLUMN vehicle_history.vehicle_id IS 'The vehicle, as named in the topic it published to.';
COMMENT ON COLUMN vehicle_history.ts IS 'End of the interval, by the vehicle''s clock (or the arrival, see ts_from_arrival).';
COMMENT ON COLUMN vehicle_history.kwh_dc IS 'Interval energy: DC energy that reached the battery since the previous reading, in kWh.';
COMMENT ON COLUMN vehicle_history.soc IS 'State of charge, in percent (0 to 100).';
COMMENT ON COLUMN vehicle_history.battery_temp IS 'Battery temperature, in degrees Celsius.';
COMMENT ON COLUMN vehicle_history.meter_id IS 'The meter of the charger the vehicle says it is plugged into; NULL where it says nothing.';
COMMENT ON COLUMN vehicle_history.received_at IS 'When the bridge received the reading.';
COMMENT ON COLUMN vehicle_history.ts_from_arrival IS 'True where the reading had no timestamp and ts is the time of arrival.';

-- One row a device, updated in place once a minute: room on the page and no index besides the key keep updates HOT.
CREATE TABLE meter_live (
    meter_id    text             PRIMARY KEY,
    ts          timestamptz      NOT NULL,
    kwh_ac      double precision NOT NULL,
    voltage     double precision NOT NULL,
    received_at timestamptz      NOT NULL
) WITH (fillfactor = 50);

COMMENT ON TABLE meter_live IS 'The newest reading of each meter by its own ts; an older reading never overwrites a newer one.';
COMMENT ON COLUMN meter_live.meter_id IS 'The meter.';
COMMENT ON COLUMN meter_live.ts IS 'End of the interval of the newest reading.';
COMMENT ON COLUMN meter_live.kwh_ac IS 'Interval energy of the newest reading, AC, in kWh.';
COMMENT ON COLUMN meter_live.voltage IS 'Voltage of the newest reading, in V.';
COMMENT ON COLUMN meter_live.received_at IS 'When the bridge received the newest reading.';

CREATE TABLE vehicle_live (
    vehicle_id   text             PRIMARY KEY,
    ts           timestamptz      NOT NULL,
    kwh_dc       double precision NOT NULL,
    soc          double precision NOT NULL,
    battery_temp double precision NOT NULL,
    meter_id     text,
    received_at  timestamptz      NOT NULL
) WITH (fillfactor = 50);

COMMENT ON TABLE vehicle_live IS 'The newest reading of each vehicle by its own ts; an older reading never overwrites a newer one.';
COMMENT ON COLUMN vehicle_live.vehicle_id IS 'The vehicle.';
COMMENT ON COLUMN vehicle_live.ts IS 'End of the interval of the newest reading.';
COMMENT ON COLUMN vehicle_live.kwh_dc IS 'Interval energy of the newest reading, DC, in kWh.';
COMMENT ON COLUMN vehicle_live.soc IS 'State of charge of the newest reading, in percent.';
COMMENT ON COLUMN vehicle_live.battery_temp IS 'Battery temperature of the newest reading, in degrees Celsius.';
COMMENT ON COLUMN vehicle_live.meter_id IS 'The meter of the charger it was plugged into; NULL where the reading names none.';
COMMENT ON COLUMN vehicle_live.received_at IS 'When the bridge received the newest reading.';

CREATE TABLE device_presence (
    device_id   text        NOT NULL,
    kind        text        NOT NULL CHECK (kind IN ('meter', 'vehicle')),
    online      boolean     NOT NULL,
    received_at timestamptz NOT NULL,
    PRIMARY KEY (device_id, kind)
) WITH (fillfactor = 50);

COMMENT ON TABLE device_presence IS 'What each device (or its last will) last said on its status topic.';
COMMENT ON COLUMN device_presence.device_id IS 'The meter or vehicle.';
COMMENT ON COLUMN device_presence.kind IS 'meter or vehicle.';
COMMENT ON COLUMN device_presence.online IS 'True after "online", false after "offline".';
COMMENT ON COLUMN device_presence.received_at IS 'When the bridge received that status.';

CREATE TABLE dead_letter (
    device_id    text        NOT NULL,
    digest       bytea       NOT NULL,
    topic        text        NOT NULL,
    payload      bytea       NOT NULL,
    content_type text,
    reason       text        NOT NULL,
    detail       text        NOT NULL,
    received_at  timestamptz NOT NULL,
    PRIMARY KEY (device_id, digest)
);

COMMENT ON TABLE dead_letter IS
    'Messages and readings that could not become history, kept whole; see `wattbridge dead-letters`. The same content on the same topic is kept once.';
COMMENT ON COLUMN dead_letter.device_id IS 'The device named in the topic; empty where the topic names none that is valid.';
COMMENT ON COLUMN dead_letter.digest IS 'SHA-256 over topic, content type and payload: the identity of the dead letter.';
COMMENT ON COLUMN dead_letter.topic IS 'The topic it was published to.';
COMMENT ON COLUMN dead_letter.payload IS 'The payload; for one element of an array, or a conflict, that reading alone.';
COMMENT ON COLUMN dead_letter.content_type IS 'The MQTT 5 content type, where the publisher gave one.';
COMMENT ON COLUMN dead_letter.reason IS 'Stable reason code, see docs/architecture.md.';
COMMENT ON COLUMN dead_letter.detail IS 'The reason for a person to read.';
COMMENT ON COLUMN dead_letter.received_at IS 'When the bridge first received it.';

CREATE TABLE ingest_counter (
    instance      text        PRIMARY KEY,
    received      bigint      NOT NULL,
    stored        bigint      NOT NULL,
    duplicate     bigint      NOT NULL,
    dead_lettered bigint      NOT NULL,
    presence      bigint      NOT NULL,
    last_batch    uuid        NOT NULL,
    updated_at    timestamptz NOT NULL
) WITH (fillfactor = 50);

COMMENT ON TABLE ingest_counter IS
    'What became of every reading, counted in the transaction that decided it: received = stored + duplicate + dead_lettered.';
COMMENT ON COLUMN ingest_counter.instance IS 'The daemon, by its MQTT client id; "dead-letters replay" is `wattbridge dead-letters replay`.';
COMMENT ON COLUMN ingest_counter.received IS 'Readings received; a message that could not be decoded counts as one.';
COMMENT ON COLUMN ingest_counter.stored IS 'Readings that became history rows.';
COMMENT ON COLUMN ingest_counter.duplicate IS 'Readings and dead letters that were there already.';
COMMENT ON COLUMN ingest_counter.dead_lettered IS 'Dead letters written, less those that a replay turned into history.';
COMMENT ON COLUMN ingest_counter.presence IS 'Status messages (online, offline) taken; counted apart.';
COMMENT ON COLUMN ingest_counter.last_batch IS 'The batch counted last: a batch whose commit was not answered is not counted twice.';
COMMENT ON COLUMN ingest_counter.updated_at IS 'When the last batch was committed.';

-- Creates the daily partitions of one history table that are missing. A new partition is made apart and then attached:
-- attaching takes no lock that readers or writers of the history wait for. SECURITY DEFINER because only the
-- owner may attach, and the writer role is not the owner.
CREATE FUNCTION ensure_history_partitions(history regclass, days date[]) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    base    text    := (SELECT relname FROM pg_class WHERE oid = history);
    schema  text    := (SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = history);
    created integer := 0;
    wanted  date;
    name    text;
BEGIN
    -- By identity: somebody may have a table of that name in a schema of their own.
    IF history <> ALL (ARRAY['meter_history', 'vehicle_history']::regclass[]) THEN
        RAISE EXCEPTION '% is not a history table', history;
    END IF;
    FOREACH wanted IN ARRAY days LOOP
        name := format('%s_%s', base, to_char(wanted, 'YYYYMMDD'));
        CONTINUE WHEN to_regclass(format('%s.%I', schema, name)) IS NOT NULL;
        -- Several daemons may want days at once: one makes them, the others see them made. One lock for all days of a
        -- history: attaching locks the parent as well, and two locks taken by turns would deadlock.
        PERFORM pg_advisory_xact_lock(hashtext('wattbridge partitions'), hashtext(base));
        -- Not to_regclass again: it may remember that there was no such table.
        CONTINUE WHEN EXISTS (SELECT FROM pg_inherits JOIN pg_class ON oid = inhrelid
                              WHERE inhparent = history AND relname = name);
        EXECUTE format('CREATE TABLE %s.%I (LIKE %s INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES)', schema, name, history);
        EXECUTE format('ALTER TABLE %s ATTACH PARTITION %s.%I FOR VALUES FROM (%L) TO (%L)',
                       history, schema, name,
                       wanted::timestamp AT TIME ZONE 'UTC', (wanted + 1)::timestamp AT TIME ZONE 'UTC');
        created := created + 1;
    END LOOP;
    RETURN created;
END
$$;

COMMENT ON FUNCTION ensure_history_partitions(regclass, date[]) IS
    'Creates the missing daily partitions of meter_history or vehicle_history; returns how many it created.';
REVOKE ALL ON FUNCTION ensure_history_partitions(regclass, date[]) FROM PUBLIC;
