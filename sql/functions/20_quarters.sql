-- What each device sent, by quarter hour: of history alone, and the same put together from rollups, marks and the open tail.
-- Settings of the functions: what looks at all devices is planned for the very window, what looks some up by key once a
-- session; block ranges and keys before whole partitions; hashing before sorting (statistics do not know how few devices a
-- quarter hour has).

CREATE OR REPLACE FUNCTION meter_quarters_between(since timestamptz, until timestamptz) RETURNS SETOF meter_quarter_hour
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET enable_sort = off
SET jit = off
SET work_mem = '64MB'
AS $$
DECLARE
    late_after interval := (SELECT setting.late_after FROM analytics_setting AS setting);
BEGIN
    RETURN QUERY
    SELECT
        history.meter_id,
        date_bin('15 minutes', history.ts, 'epoch') AS quarter_hour,
        count(*)::integer,
        sum(history.kwh_ac),
        (count(*) FILTER (WHERE history.received_at - history.ts > late_after))::integer,
        min(history.received_at - history.ts) FILTER (WHERE NOT history.ts_from_arrival)
    FROM meter_history AS history
    WHERE history.ts >= meter_quarters_between.since AND history.ts < meter_quarters_between.until
    GROUP BY history.meter_id, date_bin('15 minutes', history.ts, 'epoch');
END
$$;

COMMENT ON FUNCTION meter_quarters_between(timestamptz, timestamptz) IS
    'What each meter sent by quarter hour, of its readings with since <= ts < until, computed from history alone.';

CREATE OR REPLACE FUNCTION meter_quarters_of(meters text[], sinces timestamptz[], untils timestamptz[]) RETURNS SETOF meter_quarter_hour
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET jit = off
AS $$
DECLARE
    late_after interval    := (SELECT setting.late_after FROM analytics_setting AS setting);
    -- Beside each window of a meter: partitions outside of all of them are not looked at.
    earliest   timestamptz := (SELECT min(bound) FROM unnest(sinces) AS bound);
    latest     timestamptz := (SELECT max(bound) FROM unnest(untils) AS bound);
BEGIN
    RETURN QUERY
    SELECT
        piece.meter_id,
        date_bin('15 minutes', history.ts, 'epoch') AS quarter_hour,
        count(*)::integer,
        sum(history.kwh_ac),
        (count(*) FILTER (WHERE history.received_at - history.ts > late_after))::integer,
        min(history.received_at - history.ts) FILTER (WHERE NOT history.ts_from_arrival)
    FROM unnest(meter_quarters_of.meters, meter_quarters_of.sinces, meter_quarters_of.untils) AS piece (meter_id, since, until)
    CROSS JOIN LATERAL (
        SELECT reading.ts, reading.kwh_ac, reading.received_at, reading.ts_from_arrival
        FROM meter_history AS reading
        WHERE reading.meter_id = piece.meter_id
            AND reading.ts >= piece.since AND reading.ts < piece.until
            AND reading.ts >= earliest AND reading.ts < latest
        OFFSET 0
    ) AS history
    GROUP BY piece.meter_id, date_bin('15 minutes', history.ts, 'epoch');
END
$$;

COMMENT ON FUNCTION meter_quarters_of(text[], timestamptz[], timestamptz[]) IS
    'What the n-th meter sent by quarter hour, from the n-th since to the n-th until, computed from history alone. No two windows of a meter within one quarter hour.';

CREATE OR REPLACE FUNCTION vehicle_quarters_between(since timestamptz, until timestamptz) RETURNS SETOF vehicle_quarter_hour
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET enable_sort = off
SET jit = off
SET work_mem = '64MB'
AS $$
DECLARE
    late_after interval := (SELECT setting.late_after FROM analytics_setting AS setting);
BEGIN
    RETURN QUERY
    SELECT
        history.vehicle_id,
        date_bin('15 minutes', history.ts, 'epoch') AS quarter_hour,
        count(*)::integer,
        sum(history.kwh_dc),
        sum(history.soc),
        sum(history.battery_temp),
        max(history.battery_temp),
        (count(*) FILTER (WHERE history.received_at - history.ts > late_after))::integer,
        min(history.received_at - history.ts) FILTER (WHERE NOT history.ts_from_arrival)
    FROM vehicle_history AS history
    WHERE history.ts >= vehicle_quarters_between.since AND history.ts < vehicle_quarters_between.until
    GROUP BY history.vehicle_id, date_bin('15 minutes', history.ts, 'epoch');
END
$$;

COMMENT ON FUNCTION vehicle_quarters_between(timestamptz, timestamptz) IS
    'What each vehicle sent by quarter hour, of its readings with since <= ts < until, computed from history alone.';

CREATE OR REPLACE FUNCTION vehicle_quarters_of(vehicles text[], sinces timestamptz[], untils timestamptz[]) RETURNS SETOF vehicle_quarter_hour
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET jit = off
AS $$
DECLARE
    late_after interval    := (SELECT setting.late_after FROM analytics_setting AS setting);
    -- Beside each window of a vehicle: partitions outside of all of them are not looked at.
    earliest   timestamptz := (SELECT min(bound) FROM unnest(sinces) AS bound);
    latest     timestamptz := (SELECT max(bound) FROM unnest(untils) AS bound);
BEGIN
    RETURN QUERY
    SELECT
        piece.vehicle_id,
        date_bin('15 minutes', history.ts, 'epoch') AS quarter_hour,
        count(*)::integer,
        sum(history.kwh_dc),
        sum(history.soc),
        sum(history.battery_temp),
        max(history.battery_temp),
        (count(*) FILTER (WHERE history.received_at - history.ts > late_after))::integer,
        min(history.received_at - history.ts) FILTER (WHERE NOT history.ts_from_arrival)
    FROM unnest(vehicle_quarters_of.vehicles, vehicle_quarters_of.sinces, vehicle_quarters_of.untils) AS piece (vehicle_id, since, until)
    CROSS JOIN LATERAL (
        SELECT reading.ts, reading.kwh_dc, reading.soc, reading.battery_temp, reading.received_at, reading.ts_from_arrival
        FROM vehicle_history AS reading
        WHERE reading.vehicle_id = piece.vehicle_id
            AND reading.ts >= piece.since AND reading.ts < piece.until
            AND reading.ts >= earliest AND reading.ts < latest
        OFFSET 0
    ) AS history
    GROUP BY piece.vehicle_id, date_bin('15 minutes', history.ts, 'epoch');
END
$$;

COMMENT ON FUNCTION vehicle_quarters_of(text[], timestamptz[], timestamptz[]) IS
    'What the n-th vehicle sent by quarter hour, from the n-th since to the n-th until, computed from history alone. No two windows of a vehicle within one quarter hour.';

CREATE OR REPLACE FUNCTION rolled_up(since timestamptz, until timestamptz) RETURNS tstzrange
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    SELECT CASE WHEN begins < ends THEN tstzrange(begins, ends) ELSE 'empty' END
    FROM (
        SELECT
            date_bin('15 minutes', rolled_up.since + '15 minutes' - '1 microsecond'::interval, 'epoch') AS begins,
            CASE
                WHEN rolled_up.until >= complete_until THEN complete_until
                ELSE date_bin('15 minutes', rolled_up.until, 'epoch')
            END AS ends
        FROM rollup_progress
    ) AS whole
$$;

COMMENT ON FUNCTION rolled_up(timestamptz, timestamptz) IS 'The whole quarter hours of a window that are rolled up; empty where there are none.';

CREATE OR REPLACE FUNCTION marked(device text, device_kind text) RETURNS tstzmultirange
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    SELECT coalesce(range_agg(mark.quarter_hours), '{}')
    FROM rollup_mark AS mark
    WHERE mark.device_id = marked.device AND mark.kind = marked.device_kind
$$;

COMMENT ON FUNCTION marked(text, text) IS 'The quarter hours of a meter or vehicle whose rollups are not true any more.';

CREATE OR REPLACE FUNCTION meter_quarters(
    meter text, since timestamptz DEFAULT '-infinity', until timestamptz DEFAULT 'infinity'
) RETURNS SETOF meter_quarter_hour
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET enable_seqscan = off
SET jit = off
AS $$
DECLARE
    closed tstzrange;
    rolled tstzmultirange;
    piece  tstzrange;
BEGIN
    IF since >= until THEN
        RETURN;
    END IF;
    closed := rolled_up(since, until);
    IF meter IS NOT NULL THEN
        rolled := tstzmultirange(closed) - marked(meter, 'meter');
        RETURN QUERY
        SELECT rollup.*
        FROM meter_quarter_hour AS rollup
        WHERE rollup.meter_id = meter_quarters.meter
            AND rollup.quarter_hour >= lower(rolled) AND rollup.quarter_hour < upper(rolled)
            AND rolled @> rollup.quarter_hour;
        RETURN QUERY
        SELECT edge.*
        FROM (
            SELECT array_agg(meter) AS meters, array_agg(lower(part)) AS sinces, array_agg(upper(part)) AS untils
            FROM unnest(tstzmultirange(tstzrange(since, until)) - rolled) AS part
        ) AS pieces
        CROSS JOIN LATERAL meter_quarters_of(pieces.meters, pieces.sinces, pieces.untils) AS edge;
        RETURN;
    END IF;
    RETURN QUERY
    SELECT rollup.*
    FROM meter_quarter_hour AS rollup
    WHERE rollup.quarter_hour >= lower(closed) AND rollup.quarter_hour < upper(closed)
        AND NOT EXISTS (
            SELECT FROM rollup_mark AS mark
            WHERE mark.device_id = rollup.meter_id AND mark.kind = 'meter' AND mark.quarter_hours @> rollup.quarter_hour
        );
    RETURN QUERY
    SELECT again.*
    FROM (
        SELECT array_agg(late.device_id) AS meters, array_agg(lower(part)) AS sinces, array_agg(upper(part)) AS untils
        FROM (
            SELECT mark.device_id, range_agg(mark.quarter_hours) * tstzmultirange(closed) AS quarter_hours
            FROM rollup_mark AS mark
            WHERE mark.kind = 'meter' AND mark.quarter_hours && closed
            GROUP BY mark.device_id
        ) AS late
        CROSS JOIN LATERAL unnest(late.quarter_hours) AS part
    ) AS pieces
    CROSS JOIN LATERAL meter_quarters_of(pieces.meters, pieces.sinces, pieces.untils) AS again;
    FOR piece IN SELECT unnest(tstzmultirange(tstzrange(since, until)) - tstzmultirange(closed)) LOOP
        RETURN QUERY SELECT * FROM meter_quarters_between(lower(piece), upper(piece));
    END LOOP;
END
$$;

COMMENT ON FUNCTION meter_quarters(text, timestamptz, timestamptz) IS
    'What a meter (NULL: each) sent by quarter hour, of its readings with since <= ts < until; exact at any moment. Columns as in meter_quarter_hour.';

CREATE OR REPLACE FUNCTION vehicle_quarters(
    vehicle text, since timestamptz DEFAULT '-infinity', until timestamptz DEFAULT 'infinity'
) RETURNS SETOF vehicle_quarter_hour
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET enable_seqscan = off
SET jit = off
AS $$
DECLARE
    closed tstzrange;
    rolled tstzmultirange;
    piece  tstzrange;
BEGIN
    IF since >= until THEN
        RETURN;
    END IF;
    closed := rolled_up(since, until);
    IF vehicle IS NOT NULL THEN
        rolled := tstzmultirange(closed) - marked(vehicle, 'vehicle');
        RETURN QUERY
        SELECT rollup.*
        FROM vehicle_quarter_hour AS rollup
        WHERE rollup.vehicle_id = vehicle_quarters.vehicle
            AND rollup.quarter_hour >= lower(rolled) AND rollup.quarter_hour < upper(rolled)
            AND rolled @> rollup.quarter_hour;
        RETURN QUERY
        SELECT edge.*
        FROM (
            SELECT array_agg(vehicle) AS vehicles, array_agg(lower(part)) AS sinces, array_agg(upper(part)) AS untils
            FROM unnest(tstzmultirange(tstzrange(since, until)) - rolled) AS part
        ) AS pieces
        CROSS JOIN LATERAL vehicle_quarters_of(pieces.vehicles, pieces.sinces, pieces.untils) AS edge;
        RETURN;
    END IF;
    RETURN QUERY
    SELECT rollup.*
    FROM vehicle_quarter_hour AS rollup
    WHERE rollup.quarter_hour >= lower(closed) AND rollup.quarter_hour < upper(closed)
        AND NOT EXISTS (
            SELECT FROM rollup_mark AS mark
            WHERE mark.device_id = rollup.vehicle_id AND mark.kind = 'vehicle' AND mark.quarter_hours @> rollup.quarter_hour
        );
    RETURN QUERY
    SELECT again.*
    FROM (
        SELECT array_agg(late.device_id) AS vehicles, array_agg(lower(part)) AS sinces, array_agg(upper(part)) AS untils
        FROM (
            SELECT mark.device_id, range_agg(mark.quarter_hours) * tstzmultirange(closed) AS quarter_hours
            FROM rollup_mark AS mark
            WHERE mark.kind = 'vehicle' AND mark.quarter_hours && closed
            GROUP BY mark.device_id
        ) AS late
        CROSS JOIN LATERAL unnest(late.quarter_hours) AS part
    ) AS pieces
    CROSS JOIN LATERAL vehicle_quarters_of(pieces.vehicles, pieces.sinces, pieces.untils) AS again;
    FOR piece IN SELECT unnest(tstzmultirange(tstzrange(since, until)) - tstzmultirange(closed)) LOOP
        RETURN QUERY SELECT * FROM vehicle_quarters_between(lower(piece), upper(piece));
    END LOOP;
END
$$;

COMMENT ON FUNCTION vehicle_quarters(text, timestamptz, timestamptz) IS
    'What a vehicle (NULL: each) sent by quarter hour, of its readings with since <= ts < until; exact at any moment. Columns as in vehicle_quarter_hour.';

CREATE OR REPLACE FUNCTION meter_totals(since timestamptz, until timestamptz)
RETURNS TABLE (meter_id text, readings bigint, kwh_ac double precision)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET jit = off
SET work_mem = '64MB'
AS $$
#variable_conflict use_column
DECLARE
    closed     tstzrange;
    marked_ids text[];
BEGIN
    IF since >= until THEN
        RETURN;
    END IF;
    closed := rolled_up(since, until);
    marked_ids := ARRAY(SELECT DISTINCT mark.device_id FROM rollup_mark AS mark WHERE mark.kind = 'meter' AND mark.quarter_hours && closed);
    RETURN QUERY
    SELECT part.meter_id, sum(part.readings)::bigint, sum(part.kwh_ac)
    FROM (
        SELECT rollup.meter_id, rollup.readings, rollup.kwh_ac
        FROM meter_quarter_hour AS rollup
        WHERE rollup.quarter_hour >= lower(closed) AND rollup.quarter_hour < upper(closed) AND rollup.meter_id <> ALL (marked_ids)
        UNION ALL
        SELECT again.meter_id, again.readings, again.kwh_ac
        FROM unnest(marked_ids) AS meter
        CROSS JOIN LATERAL meter_quarters(meter, lower(closed), upper(closed)) AS again
        UNION ALL
        SELECT edge.meter_id, edge.readings, edge.kwh_ac
        FROM unnest(tstzmultirange(tstzrange(meter_totals.since, meter_totals.until)) - tstzmultirange(closed)) AS piece
        CROSS JOIN LATERAL meter_quarters_between(lower(piece), upper(piece)) AS edge
    ) AS part
    GROUP BY part.meter_id;
END
$$;

COMMENT ON FUNCTION meter_totals(timestamptz, timestamptz) IS
    'Readings of each meter with since <= ts < until, and their AC energy in kWh; exact at any moment.';

CREATE OR REPLACE FUNCTION vehicle_totals(since timestamptz, until timestamptz)
RETURNS TABLE (
    vehicle_id        text,
    readings          bigint,
    kwh_dc            double precision,
    soc_sum           double precision,
    temp_sum          double precision,
    temp_max          double precision,
    last_quarter_hour timestamptz
)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET jit = off
SET work_mem = '64MB'
AS $$
#variable_conflict use_column
DECLARE
    closed     tstzrange;
    marked_ids text[];
BEGIN
    IF since >= until THEN
        RETURN;
    END IF;
    closed := rolled_up(since, until);
    marked_ids := ARRAY(SELECT DISTINCT mark.device_id FROM rollup_mark AS mark WHERE mark.kind = 'vehicle' AND mark.quarter_hours && closed);
    RETURN QUERY
    SELECT
        part.vehicle_id,
        sum(part.readings)::bigint,
        sum(part.kwh_dc),
        sum(part.soc_sum),
        sum(part.temp_sum),
        max(part.temp_max),
        max(part.quarter_hour)
    FROM (
        SELECT rollup.*
        FROM vehicle_quarter_hour AS rollup
        WHERE rollup.quarter_hour >= lower(closed) AND rollup.quarter_hour < upper(closed) AND rollup.vehicle_id <> ALL (marked_ids)
        UNION ALL
        SELECT again.*
        FROM unnest(marked_ids) AS vehicle
        CROSS JOIN LATERAL vehicle_quarters(vehicle, lower(closed), upper(closed)) AS again
        UNION ALL
        SELECT edge.*
        FROM unnest(tstzmultirange(tstzrange(vehicle_totals.since, vehicle_totals.until)) - tstzmultirange(closed)) AS piece
        CROSS JOIN LATERAL vehicle_quarters_between(lower(piece), upper(piece)) AS edge
    ) AS part
    GROUP BY part.vehicle_id;
END
$$;

COMMENT ON FUNCTION vehicle_totals(timestamptz, timestamptz) IS
    'Readings of each vehicle with since <= ts < until, summed up (kWh, percent, degrees Celsius); exact at any moment.';
