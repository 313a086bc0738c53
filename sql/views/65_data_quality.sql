-- Apart from device_quality: only where a device has no older rollup it looks into history, and there into every partition.
CREATE OR REPLACE FUNCTION new_devices(device text, since timestamptz)
RETURNS TABLE (kind text, device_id text, first_ts timestamptz)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET jit = off
AS $$
DECLARE
    -- One look at the index for each device: NOT EXISTS may become a join that reads all rollups there are.
    meters   text[] := ARRAY(
        SELECT live.meter_id
        FROM meter_live AS live
        WHERE (device IS NULL OR live.meter_id = device) AND (
            SELECT rollup.quarter_hour
            FROM meter_quarter_hour AS rollup
            WHERE rollup.meter_id = live.meter_id AND rollup.quarter_hour < since
            ORDER BY rollup.quarter_hour DESC
            LIMIT 1
        ) IS NULL
    );
    vehicles text[] := ARRAY(
        SELECT live.vehicle_id
        FROM vehicle_live AS live
        WHERE (device IS NULL OR live.vehicle_id = device) AND (
            SELECT rollup.quarter_hour
            FROM vehicle_quarter_hour AS rollup
            WHERE rollup.vehicle_id = live.vehicle_id AND rollup.quarter_hour < since
            ORDER BY rollup.quarter_hour DESC
            LIMIT 1
        ) IS NULL
    );
BEGIN
    IF meters <> '{}' THEN
        RETURN QUERY
        SELECT 'meter', meter.id, (SELECT min(history.ts) FROM meter_history AS history WHERE history.meter_id = meter.id)
        FROM unnest(meters) AS meter (id);
    END IF;
    IF vehicles <> '{}' THEN
        RETURN QUERY
        SELECT 'vehicle', vehicle.id, (SELECT min(history.ts) FROM vehicle_history AS history WHERE history.vehicle_id = vehicle.id)
        FROM unnest(vehicles) AS vehicle (id);
    END IF;
END
$$;

COMMENT ON FUNCTION new_devices(text, timestamptz) IS
    'Devices (one id; NULL: all) of which no rollup is older than since, with the timestamp of their first reading in history: '
    'often in the window, but not where rollups are behind.';
REVOKE ALL ON FUNCTION new_devices(text, timestamptz) FROM PUBLIC;

CREATE OR REPLACE FUNCTION device_quality(device text) RETURNS TABLE (
    kind text,
    device_id text,
    since timestamptz,
    until timestamptz,
    readings bigint,
    expected_readings bigint,
    gaps bigint,
    missing_share double precision,
    late_share double precision,
    clock_skew interval,
    duplicates bigint,
    conflicts bigint
)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET jit = off
SET work_mem = '64MB'
AS $$
#variable_conflict use_column
DECLARE
    day   tstzrange := (SELECT tstzrange(closed.since, closed.until) FROM closed_24h AS closed);
    every interval  := (SELECT setting.reading_interval FROM analytics_setting AS setting);
BEGIN
    RETURN QUERY
    WITH expected AS (
        SELECT
            live.kind,
            live.device_id,
            ceil(extract(epoch FROM span) / extract(epoch FROM every)) AS readings,
            ceil(extract(epoch FROM span) / 900) AS quarter_hours
        FROM (
            SELECT 'meter' AS kind, meter_id AS device_id FROM meter_live WHERE device IS NULL OR meter_id = device
            UNION ALL
            SELECT 'vehicle', vehicle_id FROM vehicle_live WHERE device IS NULL OR vehicle_id = device
        ) AS live
        LEFT JOIN new_devices(device, lower(day)) AS newcomer USING (kind, device_id)
        -- Nothing is expected of a device before its first reading. No first_ts: it is older than the day.
        CROSS JOIN LATERAL (SELECT upper(day) - least(greatest(newcomer.first_ts, lower(day)), upper(day))) AS time (span)
    ),
    -- Each kind by itself: sorting both together costs half as much again.
    sent AS (
        SELECT
            'meter' AS kind,
            quarter.meter_id AS device_id,
            count(*) AS quarter_hours,
            sum(quarter.readings) AS readings,
            sum(quarter.late) AS late,
            percentile_cont(0.5) WITHIN GROUP (ORDER BY quarter.least_delay) AS clock_skew
        FROM meter_quarters(device, lower(day), upper(day)) AS quarter
        GROUP BY quarter.meter_id
        UNION ALL
        SELECT
            'vehicle',
            quarter.vehicle_id,
            count(*),
            sum(quarter.readings),
            sum(quarter.late),
            percentile_cont(0.5) WITHIN GROUP (ORDER BY quarter.least_delay)
        FROM vehicle_quarters(device, lower(day), upper(day)) AS quarter
        GROUP BY quarter.vehicle_id
    ),
    conflict AS (
        SELECT
            -- A dead letter does not say what its device is. A conflict is kept as the reading it was, and only that of a
            -- vehicle has this key (an id has no quotes).
            CASE WHEN position('"vehicleId"'::bytea IN letter.payload) > 0 THEN 'vehicle' ELSE 'meter' END AS kind,
            letter.device_id,
            count(*) AS letters
        FROM dead_letter AS letter
        WHERE letter.reason = 'conflict' AND letter.received_at <@ day AND (device IS NULL OR letter.device_id = device)
        GROUP BY 1, 2
    )
    SELECT
        kind,
        device_id,
        lower(day),
        upper(day),
        coalesce(sent.readings, 0)::bigint,
        expected.readings::bigint,
        (expected.quarter_hours - coalesce(sent.quarter_hours, 0))::bigint,
        CASE WHEN expected.readings > 0 THEN greatest(0, 1 - coalesce(sent.readings, 0) / expected.readings::double precision) END,
        sent.late / sent.readings::double precision,
        sent.clock_skew,
        coalesce(again.duplicates, 0),
        coalesce(conflict.letters, 0)
    FROM expected
    LEFT JOIN sent USING (kind, device_id)
    LEFT JOIN device_duplicate AS again USING (kind, device_id)
    LEFT JOIN conflict USING (kind, device_id);
END
$$;

COMMENT ON FUNCTION device_quality(text) IS
    'What the view data_quality says about one device id, as a meter and as a vehicle, quickly; NULL: about all devices. '
    'Columns and units as there.';
REVOKE ALL ON FUNCTION device_quality(text) FROM PUBLIC;

CREATE OR REPLACE VIEW data_quality AS
SELECT
    kind,
    device_id,
    since,
    until,
    readings,
    expected_readings,
    gaps,
    missing_share,
    late_share,
    clock_skew,
    duplicates,
    conflicts
FROM device_quality(NULL);

COMMENT ON VIEW data_quality IS
    'How complete, punctual and right the readings of each device are, over the last 24 hours of closed quarter hours. '
    'For one device SELECT * FROM device_quality(''MTR-001'') is quicker. '
    'Readings count by their own timestamps: where a clock is behind, the newest ones seem missing.';
COMMENT ON COLUMN data_quality.kind IS 'meter or vehicle.';
COMMENT ON COLUMN data_quality.device_id IS 'The meter or vehicle.';
COMMENT ON COLUMN data_quality.since IS 'Start of the window.';
COMMENT ON COLUMN data_quality.until IS 'End of the window: the newest quarter hour that ended analytics_setting.late_after ago.';
COMMENT ON COLUMN data_quality.readings IS 'Readings with a timestamp in the window.';
COMMENT ON COLUMN data_quality.expected_readings IS
    'How many there would be at one each analytics_setting.reading_interval, from the first reading of the device on if that is in the window.';
COMMENT ON COLUMN data_quality.gaps IS 'Quarter hours of the window without any reading, from the first reading of the device on.';
COMMENT ON COLUMN data_quality.missing_share IS
    'Share of the expected readings that are missing, from 0 to 1; NULL where none are expected.';
COMMENT ON COLUMN data_quality.late_share IS
    'Share of the readings that arrived later than analytics_setting.late_after after their timestamps, from 0 to 1; NULL where there are none.';
COMMENT ON COLUMN data_quality.clock_skew IS
    'How far the clock of the device is behind; negative: ahead. '
    'Shortest time from timestamp to arrival in each quarter hour, and of those the median; '
    'NULL where no reading had a timestamp of its own. A device that sends most of its readings late seems behind.';
COMMENT ON COLUMN data_quality.duplicates IS 'Readings that came again with the same values, since the first day.';
COMMENT ON COLUMN data_quality.conflicts IS
    'Dead letters received in the window of readings whose device and timestamp are known with other values; the first values stay.';
