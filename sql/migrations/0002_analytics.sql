-- What the analytics need: settings, who charges where, rollups of closed quarter hours, and marks for what became late.

-- A window of time over all devices is found by block range: readings arrive about in order of ts. With multi-minmax
-- a few late ones do not widen the range of their blocks.
CREATE INDEX meter_history_ts ON meter_history USING brin (ts timestamptz_minmax_multi_ops) WITH (autosummarize = on);
CREATE INDEX vehicle_history_ts ON vehicle_history USING brin (ts timestamptz_minmax_multi_ops) WITH (autosummarize = on);
-- Who else was at a meter in a minute.
CREATE INDEX vehicle_history_meter ON vehicle_history (meter_id, ts) WHERE meter_id IS NOT NULL;

CREATE TABLE analytics_setting (
    only_row              boolean          PRIMARY KEY DEFAULT true CHECK (only_row),
    inefficient_below     double precision NOT NULL DEFAULT 0.85 CHECK (inefficient_below > 0 AND inefficient_below <= 1),
    inefficient_least_kwh double precision NOT NULL DEFAULT 2 CHECK (inefficient_least_kwh >= 0),
    efficiency_least_kwh  double precision NOT NULL DEFAULT 0.1 CHECK (efficiency_least_kwh > 0),
    session_gap           interval         NOT NULL DEFAULT '15 minutes' CHECK (session_gap BETWEEN '15 minutes' AND '1 day'),
    reading_interval      interval         NOT NULL DEFAULT '60 seconds' CHECK (reading_interval BETWEEN '1 second' AND '1 day'),
    silent_after          integer          NOT NULL DEFAULT 5 CHECK (silent_after > 0),
    late_after            interval         NOT NULL DEFAULT '2 minutes' CHECK (late_after > '0'),
    time_zone             text             NOT NULL DEFAULT 'UTC' CHECK (now() AT TIME ZONE time_zone IS NOT NULL),
    vehicle_prefix        text             CHECK (vehicle_prefix <> ''),
    meter_prefix          text             CHECK (meter_prefix <> ''),
    CHECK ((vehicle_prefix IS NULL) = (meter_prefix IS NULL))
);
INSERT INTO analytics_setting DEFAULT VALUES;

COMMENT ON TABLE analytics_setting IS
    'Settings of the analytics, in one row: UPDATE analytics_setting SET inefficient_below = 0.8. They count at once, for the past too.';
COMMENT ON COLUMN analytics_setting.only_row IS 'Keeps this table at one row.';
COMMENT ON COLUMN analytics_setting.inefficient_below IS 'Efficiency (DC / AC) below which a vehicle or charger is called inefficient.';
COMMENT ON COLUMN analytics_setting.inefficient_least_kwh IS 'Matched AC energy, in kWh, below which nothing is called inefficient.';
COMMENT ON COLUMN analytics_setting.efficiency_least_kwh IS 'Matched AC energy, in kWh, below which an efficiency means nothing and is NULL.';
COMMENT ON COLUMN analytics_setting.session_gap IS 'A longer silence of the vehicle ends its charging session; 15 minutes or more.';
COMMENT ON COLUMN analytics_setting.reading_interval IS 'How often a device is expected to send a reading.';
COMMENT ON COLUMN analytics_setting.silent_after IS 'A device is silent after so many reading intervals without a reading.';
COMMENT ON COLUMN analytics_setting.late_after IS 'A reading is late that arrives longer than this after its timestamp; a quarter hour is rolled up so long after its end.';
COMMENT ON COLUMN analytics_setting.time_zone IS 'Where a day begins at midnight, as in pg_timezone_names: Europe/Berlin.';
COMMENT ON COLUMN analytics_setting.vehicle_prefix IS
    'Naming rule, off where NULL: a vehicle whose id begins with this, and that names no meter and has no assignment, charges at the meter ...';
COMMENT ON COLUMN analytics_setting.meter_prefix IS '... whose id begins with this instead and is the same otherwise: VEH- and MTR- make VEH-001 charge at MTR-001.';

CREATE TABLE charger_assignment (
    vehicle_id text      NOT NULL CHECK (vehicle_id <> ''),
    meter_id   text      NOT NULL CHECK (meter_id <> ''),
    valid      tstzrange NOT NULL CHECK (NOT isempty(valid)),
    PRIMARY KEY (vehicle_id, valid),
    CONSTRAINT charger_assignment_one_meter_at_a_time
        EXCLUDE USING gist (
            -- Equality of text in such an index needs an extension (btree_gist) that not every server has; a range of one number does not.
            int8range(hashtextextended(vehicle_id, 0), hashtextextended(vehicle_id, 0), '[]') WITH &&,
            valid WITH &&
        )
);
CREATE INDEX charger_assignment_meter ON charger_assignment (meter_id);

COMMENT ON TABLE charger_assignment IS
    'Which charger a vehicle uses, for readings that name no meter themselves; one meter at a time. See `wattbridge assignments`.';
COMMENT ON COLUMN charger_assignment.vehicle_id IS 'The vehicle.';
COMMENT ON COLUMN charger_assignment.meter_id IS 'The meter of its charger.';
COMMENT ON COLUMN charger_assignment.valid IS 'When; a missing bound means always.';

-- Rollups of quarter hours: a pure function of history, dropped and made again at any time. One partition a month (UTC).
CREATE TABLE meter_quarter_hour (
    meter_id     text             NOT NULL,
    quarter_hour timestamptz      NOT NULL,
    readings     integer          NOT NULL,
    kwh_ac       double precision NOT NULL,
    late         integer          NOT NULL,
    least_delay  interval,
    PRIMARY KEY (meter_id, quarter_hour)
) PARTITION BY RANGE (quarter_hour);
CREATE INDEX meter_quarter_hour_brin ON meter_quarter_hour USING brin (quarter_hour timestamptz_minmax_multi_ops) WITH (autosummarize = on);

COMMENT ON TABLE meter_quarter_hour IS 'Rollup: what each meter sent in each quarter hour before rollup_progress.complete_until.';
COMMENT ON COLUMN meter_quarter_hour.meter_id IS 'The meter.';
COMMENT ON COLUMN meter_quarter_hour.quarter_hour IS 'Start of the quarter hour.';
COMMENT ON COLUMN meter_quarter_hour.readings IS 'Readings with a timestamp in it.';
COMMENT ON COLUMN meter_quarter_hour.kwh_ac IS 'Their AC energy, in kWh.';
COMMENT ON COLUMN meter_quarter_hour.late IS 'How many of them arrived late (analytics_setting.late_after).';
COMMENT ON COLUMN meter_quarter_hour.least_delay IS 'Shortest time from timestamp to arrival; NULL where no reading had a timestamp of its own.';

CREATE TABLE vehicle_quarter_hour (
    vehicle_id   text             NOT NULL,
    quarter_hour timestamptz      NOT NULL,
    readings     integer          NOT NULL,
    kwh_dc       double precision NOT NULL,
    soc_sum      double precision NOT NULL,
    temp_sum     double precision NOT NULL,
    temp_max     double precision NOT NULL,
    late         integer          NOT NULL,
    least_delay  interval,
    PRIMARY KEY (vehicle_id, quarter_hour)
) PARTITION BY RANGE (quarter_hour);
CREATE INDEX vehicle_quarter_hour_brin ON vehicle_quarter_hour USING brin (quarter_hour timestamptz_minmax_multi_ops) WITH (autosummarize = on);

COMMENT ON TABLE vehicle_quarter_hour IS 'Rollup: what each vehicle sent in each quarter hour before rollup_progress.complete_until.';
COMMENT ON COLUMN vehicle_quarter_hour.vehicle_id IS 'The vehicle.';
COMMENT ON COLUMN vehicle_quarter_hour.quarter_hour IS 'Start of the quarter hour.';
COMMENT ON COLUMN vehicle_quarter_hour.readings IS 'Readings with a timestamp in it.';
COMMENT ON COLUMN vehicle_quarter_hour.kwh_dc IS 'Their DC energy, in kWh.';
COMMENT ON COLUMN vehicle_quarter_hour.soc_sum IS 'Sum of their states of charge, in percent: divide by readings.';
COMMENT ON COLUMN vehicle_quarter_hour.temp_sum IS 'Sum of their battery temperatures, in degrees Celsius: divide by readings.';
COMMENT ON COLUMN vehicle_quarter_hour.temp_max IS 'Highest battery temperature, in degrees Celsius.';
COMMENT ON COLUMN vehicle_quarter_hour.late IS 'How many of them arrived late (analytics_setting.late_after).';
COMMENT ON COLUMN vehicle_quarter_hour.least_delay IS 'Shortest time from timestamp to arrival; NULL where no reading had a timestamp of its own.';

CREATE TABLE charging_quarter_hour (
    vehicle_id   text             NOT NULL,
    quarter_hour timestamptz      NOT NULL,
    first_ts     timestamptz      NOT NULL,
    last_ts      timestamptz      NOT NULL,
    meter_id     text             NOT NULL,
    readings     integer          NOT NULL,
    kwh_dc       double precision NOT NULL,
    minutes      integer          NOT NULL,
    matched_ac   double precision NOT NULL,
    matched_dc   double precision NOT NULL,
    soc_from     double precision NOT NULL,
    soc_to       double precision NOT NULL,
    peak_kwh     double precision NOT NULL,
    PRIMARY KEY (vehicle_id, quarter_hour, first_ts)
) PARTITION BY RANGE (quarter_hour);
CREATE INDEX charging_quarter_hour_brin ON charging_quarter_hour USING brin (quarter_hour timestamptz_minmax_multi_ops) WITH (autosummarize = on);
CREATE INDEX charging_quarter_hour_meter ON charging_quarter_hour (meter_id, quarter_hour);

COMMENT ON TABLE charging_quarter_hour IS
    'Rollup: runs of readings of one vehicle at one meter within a quarter hour before rollup_progress.complete_until. Usually one run; more where it changed the meter.';
COMMENT ON COLUMN charging_quarter_hour.vehicle_id IS 'The vehicle.';
COMMENT ON COLUMN charging_quarter_hour.quarter_hour IS 'Start of the quarter hour.';
COMMENT ON COLUMN charging_quarter_hour.first_ts IS 'First reading of the run.';
COMMENT ON COLUMN charging_quarter_hour.last_ts IS 'Last reading of the run.';
COMMENT ON COLUMN charging_quarter_hour.meter_id IS 'The meter, by the reading itself, by assignment or by the naming rule.';
COMMENT ON COLUMN charging_quarter_hour.readings IS 'Readings of the run.';
COMMENT ON COLUMN charging_quarter_hour.kwh_dc IS 'Their DC energy, in kWh.';
COMMENT ON COLUMN charging_quarter_hour.minutes IS 'Matched minutes; a minute belongs to the run of its first reading at the meter.';
COMMENT ON COLUMN charging_quarter_hour.matched_ac IS 'AC energy of the matched minutes, in kWh.';
COMMENT ON COLUMN charging_quarter_hour.matched_dc IS 'DC energy of the matched minutes, in kWh.';
COMMENT ON COLUMN charging_quarter_hour.soc_from IS 'State of charge of the first reading, in percent.';
COMMENT ON COLUMN charging_quarter_hour.soc_to IS 'State of charge of the last reading, in percent.';
COMMENT ON COLUMN charging_quarter_hour.peak_kwh IS 'Most DC energy in one minute, in kWh.';

CREATE TABLE charging_two_hours (
    vehicle_id text             NOT NULL,
    meter_id   text             NOT NULL,
    two_hours  timestamptz      NOT NULL,
    minutes    bigint           NOT NULL,
    matched_ac double precision NOT NULL,
    matched_dc double precision NOT NULL,
    PRIMARY KEY (vehicle_id, two_hours, meter_id)
) PARTITION BY RANGE (two_hours);
CREATE INDEX charging_two_hours_brin ON charging_two_hours USING brin (two_hours timestamptz_minmax_multi_ops) WITH (autosummarize = on);

COMMENT ON TABLE charging_two_hours IS
    'Rollup of charging_quarter_hour to two hours (UTC) before rollup_progress.complete_until: what makes a day of the whole fleet quick.';
COMMENT ON COLUMN charging_two_hours.vehicle_id IS 'The vehicle.';
COMMENT ON COLUMN charging_two_hours.meter_id IS 'The meter.';
COMMENT ON COLUMN charging_two_hours.two_hours IS 'Start of the two hours: an even hour of UTC.';
COMMENT ON COLUMN charging_two_hours.minutes IS 'Matched minutes.';
COMMENT ON COLUMN charging_two_hours.matched_ac IS 'AC energy of the matched minutes, in kWh.';
COMMENT ON COLUMN charging_two_hours.matched_dc IS 'DC energy of the matched minutes, in kWh.';

CREATE TABLE rollup_progress (
    only_row       boolean     PRIMARY KEY DEFAULT true CHECK (only_row),
    late_before    timestamptz NOT NULL DEFAULT '-infinity',
    complete_until timestamptz NOT NULL DEFAULT '-infinity',
    history_since  timestamptz NOT NULL DEFAULT '-infinity',
    CHECK (history_since <= complete_until AND complete_until <= late_before)
);
INSERT INTO rollup_progress DEFAULT VALUES;

COMMENT ON TABLE rollup_progress IS 'How far the rollups are; one row.';
COMMENT ON COLUMN rollup_progress.only_row IS 'Keeps this table at one row.';
COMMENT ON COLUMN rollup_progress.late_before IS 'Watermark: a reading with an earlier timestamp is marked by the transaction that stores it.';
COMMENT ON COLUMN rollup_progress.complete_until IS 'The rollups hold every quarter hour before this, except what is marked. From here on views read history.';
COMMENT ON COLUMN rollup_progress.history_since IS 'Earlier history was dropped (retention); its rollups stay and are never made again.';

CREATE TABLE rollup_mark (
    device_id     text      NOT NULL,
    kind          text      NOT NULL CHECK (kind IN ('meter', 'vehicle')),
    id            bigint    GENERATED ALWAYS AS IDENTITY,
    quarter_hours tstzrange NOT NULL CHECK (NOT isempty(quarter_hours)),
    PRIMARY KEY (device_id, kind, id)
);

-- Never merged: a mark that somebody is about to delete must not swallow the one of a reading that is just being stored.
COMMENT ON TABLE rollup_mark IS 'Quarter hours of devices whose rollups are not true any more; views read their history until they are made again.';
COMMENT ON COLUMN rollup_mark.device_id IS 'The meter or vehicle.';
COMMENT ON COLUMN rollup_mark.kind IS 'meter: all that happened at this meter. vehicle: all that this vehicle did.';
COMMENT ON COLUMN rollup_mark.id IS 'Tells marks of a device apart.';
COMMENT ON COLUMN rollup_mark.quarter_hours IS 'From the start of a quarter hour to the start of another.';

CREATE TABLE device_duplicate (
    device_id  text   NOT NULL,
    kind       text   NOT NULL CHECK (kind IN ('meter', 'vehicle')),
    duplicates bigint NOT NULL,
    PRIMARY KEY (device_id, kind)
) WITH (fillfactor = 50);

COMMENT ON TABLE device_duplicate IS 'How often each device sent a reading again that was known already.';
COMMENT ON COLUMN device_duplicate.device_id IS 'The meter or vehicle.';
COMMENT ON COLUMN device_duplicate.kind IS 'meter or vehicle.';
COMMENT ON COLUMN device_duplicate.duplicates IS 'Readings that changed nothing.';

-- Makes one partition apart and then attaches it: attaching takes no lock that readers or writers of the table wait for.
CREATE FUNCTION ensure_partition(parent regclass, suffix text, since timestamptz, until timestamptz) RETURNS boolean
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    base   text := (SELECT relname FROM pg_class WHERE oid = parent);
    schema text := (SELECT relnamespace::regnamespace::text FROM pg_class WHERE oid = parent);
    name   text := format('%s_%s', base, suffix);
BEGIN
    IF to_regclass(format('%s.%I', schema, name)) IS NOT NULL THEN
        RETURN false;
    END IF;
    -- Several daemons may want partitions at once: one makes them, the others see them made. One lock for all of a
    -- table: attaching locks the parent as well, and two locks taken by turns would deadlock.
    PERFORM pg_advisory_xact_lock(hashtext('wattbridge partitions'), hashtext(base));
    -- Not to_regclass again: it may remember that there was no such table.
    IF EXISTS (SELECT FROM pg_inherits JOIN pg_class ON oid = inhrelid WHERE inhparent = parent AND relname = name) THEN
        RETURN false;
    END IF;
    EXECUTE format('CREATE TABLE %s.%I (LIKE %s INCLUDING DEFAULTS INCLUDING CONSTRAINTS INCLUDING INDEXES)', schema, name, parent);
    EXECUTE format('ALTER TABLE %s ATTACH PARTITION %s.%I FOR VALUES FROM (%L) TO (%L)', parent, schema, name, since, until);
    RETURN true;
END
$$;

COMMENT ON FUNCTION ensure_partition(regclass, text, timestamptz, timestamptz) IS
    'Creates the partition <table>_<suffix> of a table unless it is there; returns whether it did.';
REVOKE ALL ON FUNCTION ensure_partition(regclass, text, timestamptz, timestamptz) FROM PUBLIC;

CREATE OR REPLACE FUNCTION ensure_history_partitions(history regclass, days date[]) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    created integer := 0;
    wanted  date;
BEGIN
    -- By identity: somebody may have a table of that name in a schema of their own.
    IF history <> ALL (ARRAY['meter_history', 'vehicle_history']::regclass[]) THEN
        RAISE EXCEPTION '% is not a history table', history;
    END IF;
    FOREACH wanted IN ARRAY days LOOP
        created := created + ensure_partition(
            history, to_char(wanted, 'YYYYMMDD'),
            wanted::timestamp AT TIME ZONE 'UTC', (wanted + 1)::timestamp AT TIME ZONE 'UTC'
        )::integer;
    END LOOP;
    RETURN created;
END
$$;
