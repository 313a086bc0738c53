-- What a chart of energy needs: one row a bucket of time, over the rollups and the open tail.

CREATE OR REPLACE FUNCTION energy_by_quarter_hour(
    since timestamptz,
    until timestamptz DEFAULT 'infinity',
    meter text DEFAULT NULL,
    vehicle text DEFAULT NULL
) RETURNS TABLE (
    starts timestamptz,
    readings_ac bigint,
    kwh_ac double precision,
    readings_dc bigint,
    kwh_dc double precision
)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    SELECT
        quarter_hour,
        CASE WHEN meter IS NOT NULL OR vehicle IS NULL THEN coalesce(ac.readings, 0) END,
        ac.kwh,
        CASE WHEN vehicle IS NOT NULL OR meter IS NULL THEN coalesce(dc.readings, 0) END,
        dc.kwh
    FROM (
        SELECT quarter_hour, sum(readings) AS readings, sum(kwh_ac) AS kwh
        FROM meter_quarters(meter, since, until)
        -- A side that was not asked for is not read at all.
        WHERE meter IS NOT NULL OR vehicle IS NULL
        GROUP BY quarter_hour
    ) AS ac
    FULL JOIN (
        SELECT quarter_hour, sum(readings) AS readings, sum(kwh_dc) AS kwh
        FROM vehicle_quarters(vehicle, since, until)
        WHERE vehicle IS NOT NULL OR meter IS NULL
        GROUP BY quarter_hour
    ) AS dc USING (quarter_hour)
    ORDER BY quarter_hour
$$;

COMMENT ON FUNCTION energy_by_quarter_hour(timestamptz, timestamptz, text, text) IS
    'Energy by quarter hour of the readings with since <= ts < until. meter => ''MTR-001'': AC of that meter; vehicle => ''VEH-001'': DC of that '
    'vehicle; both: both; neither: the fleet. Columns: starts (of the quarter hour), readings_ac, kwh_ac (AC energy, in kWh), readings_dc, kwh_dc '
    '(DC energy, in kWh). A bucket without readings is absent; where only one side has readings, the other has 0 readings and NULL kWh; '
    'a side that was not asked for is NULL. A bucket that since or until cuts counts with what is inside.';
REVOKE ALL ON FUNCTION energy_by_quarter_hour(timestamptz, timestamptz, text, text) FROM PUBLIC;

CREATE OR REPLACE FUNCTION energy_by_hour(
    since timestamptz,
    until timestamptz DEFAULT 'infinity',
    meter text DEFAULT NULL,
    vehicle text DEFAULT NULL
) RETURNS TABLE (
    starts timestamptz,
    readings_ac bigint,
    kwh_ac double precision,
    readings_dc bigint,
    kwh_dc double precision
)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    SELECT
        -- In the zone: its hours may begin at a quarter past in UTC. As timestamptz, so that the hour which comes twice
        -- in autumn stays two.
        date_trunc('hour', quarter.starts, time_zone) AS hour,
        sum(quarter.readings_ac)::bigint,
        sum(quarter.kwh_ac),
        sum(quarter.readings_dc)::bigint,
        sum(quarter.kwh_dc)
    FROM energy_by_quarter_hour(since, until, meter, vehicle) AS quarter
    CROSS JOIN analytics_setting
    GROUP BY hour
    ORDER BY hour
$$;

COMMENT ON FUNCTION energy_by_hour(timestamptz, timestamptz, text, text) IS
    'Energy by hour of analytics_setting.time_zone; otherwise as energy_by_quarter_hour. Columns: starts (of the hour), readings_ac, '
    'kwh_ac (AC energy, in kWh), readings_dc, kwh_dc (DC energy, in kWh).';
REVOKE ALL ON FUNCTION energy_by_hour(timestamptz, timestamptz, text, text) FROM PUBLIC;

CREATE OR REPLACE FUNCTION energy_by_day(
    since timestamptz,
    until timestamptz DEFAULT 'infinity',
    meter text DEFAULT NULL,
    vehicle text DEFAULT NULL
) RETURNS TABLE (
    day date,
    starts timestamptz,
    readings_ac bigint,
    kwh_ac double precision,
    readings_dc bigint,
    kwh_dc double precision
)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    SELECT
        by_day.day,
        -- The first instant of the day. Midnight will not do: where clocks change at midnight there may be none, or two.
        (
            SELECT min(instant)
            FROM generate_series(
                by_day.day::timestamp AT TIME ZONE by_day.time_zone - interval '3 hours',
                by_day.day::timestamp AT TIME ZONE by_day.time_zone + interval '3 hours',
                interval '15 minutes'
            ) AS instant
            WHERE (instant AT TIME ZONE by_day.time_zone)::date = by_day.day
        ),
        by_day.readings_ac,
        by_day.kwh_ac,
        by_day.readings_dc,
        by_day.kwh_dc
    FROM (
        SELECT
            (quarter.starts AT TIME ZONE time_zone)::date AS day,
            time_zone,
            sum(quarter.readings_ac)::bigint AS readings_ac,
            sum(quarter.kwh_ac) AS kwh_ac,
            sum(quarter.readings_dc)::bigint AS readings_dc,
            sum(quarter.kwh_dc) AS kwh_dc
        FROM energy_by_quarter_hour(since, until, meter, vehicle) AS quarter
        CROSS JOIN analytics_setting
        GROUP BY day, time_zone
    ) AS by_day
    ORDER BY by_day.day
$$;

COMMENT ON FUNCTION energy_by_day(timestamptz, timestamptz, text, text) IS
    'Energy by day of analytics_setting.time_zone, 23 or 25 hours long where clocks change; otherwise as energy_by_quarter_hour. Columns: day, '
    'starts (its first instant), readings_ac, kwh_ac (AC energy, in kWh), readings_dc, kwh_dc (DC energy, in kWh).';
REVOKE ALL ON FUNCTION energy_by_day(timestamptz, timestamptz, text, text) FROM PUBLIC;

CREATE OR REPLACE FUNCTION vehicle_efficiency_by_hour(
    vehicle text,
    since timestamptz,
    until timestamptz DEFAULT 'infinity'
) RETURNS TABLE (
    starts timestamptz,
    kwh_ac double precision,
    kwh_dc double precision,
    efficiency double precision,
    reason text
)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    SELECT
        hour.starts,
        hour.ac,
        hour.dc,
        CASE WHEN why.reason IS NULL THEN hour.dc / hour.ac END,
        why.reason
    FROM (
        SELECT
            date_trunc('hour', run.quarter_hour, time_zone) AS starts,
            sum(run.readings) AS readings,
            sum(run.minutes) AS minutes,
            sum(run.matched_ac) AS ac,
            sum(run.matched_dc) AS dc,
            efficiency_least_kwh AS least_kwh
        FROM vehicle_runs(vehicle, since, until) AS run
        CROSS JOIN analytics_setting
        GROUP BY date_trunc('hour', run.quarter_hour, time_zone), efficiency_least_kwh
    ) AS hour
    CROSS JOIN LATERAL efficiency_reason(hour.readings, true, hour.minutes, hour.ac, hour.dc, hour.least_kwh) AS why (reason)
    ORDER BY hour.starts
$$;

COMMENT ON FUNCTION vehicle_efficiency_by_hour(text, timestamptz, timestamptz) IS
    'How efficiently a vehicle charged, by hour of analytics_setting.time_zone, of its readings with since <= ts < until; the sums are those of '
    'vehicle_performance(). Columns: starts (of the hour), kwh_ac, kwh_dc (energy of the matched minutes, in kWh), efficiency (kwh_dc / kwh_ac; NULL '
    'where it means nothing), reason (why there is none: no matched minute, too little energy, more DC than AC). Hours in which it was plugged in '
    'nowhere are absent.';
REVOKE ALL ON FUNCTION vehicle_efficiency_by_hour(text, timestamptz, timestamptz) FROM PUBLIC;
