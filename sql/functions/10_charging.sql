-- Runs of readings at a meter and their matched minutes, computed from history. A matched minute is one in which exactly
-- one vehicle reported from the meter and the meter reported as well. Twice: for all vehicles in a window, found by
-- block range, and for some vehicles, found by key. Both say the same; the rows are those of charging_quarter_hour.

CREATE OR REPLACE FUNCTION charging_between(since timestamptz, until timestamptz) RETURNS SETOF charging_quarter_hour
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET enable_sort = off
SET enable_nestloop = off
SET jit = off
SET work_mem = '64MB'
AS $$
BEGIN
    RETURN QUERY
    WITH plugged AS MATERIALIZED (
        SELECT
            reading.vehicle_id,
            reading.ts,
            reading.kwh_dc,
            reading.soc,
            reading.meter_id,
            date_bin('15 minutes', reading.ts, 'epoch') AS quarter_hour
        FROM vehicle_reading AS reading
        WHERE reading.ts >= charging_between.since AND reading.ts < charging_between.until AND reading.meter_id IS NOT NULL
    ),
    stay AS (
        SELECT
            plugged.vehicle_id,
            plugged.quarter_hour,
            min(plugged.ts) AS first_ts,
            max(plugged.ts) AS last_ts,
            min(plugged.meter_id COLLATE "C") AS meter_id,
            max(plugged.meter_id COLLATE "C") AS other_meter_id,
            count(*)::integer AS readings,
            sum(plugged.kwh_dc) AS kwh_dc
        FROM plugged
        GROUP BY plugged.vehicle_id, plugged.quarter_hour
    ),
    run AS (
        -- Nearly all: one meter in the quarter hour, so one run.
        SELECT stay.vehicle_id, stay.quarter_hour, stay.first_ts, stay.last_ts, stay.meter_id, stay.readings, stay.kwh_dc
        FROM stay
        WHERE stay.meter_id = stay.other_meter_id
        UNION ALL
        SELECT
            numbered.vehicle_id,
            numbered.quarter_hour,
            min(numbered.ts),
            max(numbered.ts),
            min(numbered.meter_id),
            count(*)::integer,
            sum(numbered.kwh_dc)
        FROM (
            SELECT marked.*, count(*) FILTER (WHERE marked.begins) OVER (PARTITION BY marked.vehicle_id, marked.quarter_hour ORDER BY marked.ts) AS number
            FROM (
                SELECT
                    plugged.*,
                    lag(plugged.meter_id) OVER (PARTITION BY plugged.vehicle_id, plugged.quarter_hour ORDER BY plugged.ts)
                        IS DISTINCT FROM plugged.meter_id AS begins
                FROM plugged
                JOIN stay USING (vehicle_id, quarter_hour)
                WHERE stay.meter_id <> stay.other_meter_id
            ) AS marked
        ) AS numbered
        GROUP BY numbered.vehicle_id, numbered.quarter_hour, numbered.number
    ),
    meter_minute AS (
        SELECT
            plugged.meter_id,
            date_bin('1 minute', plugged.ts, 'epoch') AS minute,
            min(plugged.vehicle_id COLLATE "C") AS vehicle_id,
            max(plugged.vehicle_id COLLATE "C") AS other_vehicle_id,
            min(plugged.ts) AS first_ts,
            sum(plugged.kwh_dc) AS dc
        FROM plugged
        GROUP BY plugged.meter_id, minute
    ),
    metered AS (
        SELECT history.meter_id, date_bin('1 minute', history.ts, 'epoch') AS minute, sum(history.kwh_ac) AS ac
        FROM meter_history AS history
        WHERE history.ts >= charging_between.since AND history.ts < charging_between.until
            AND history.meter_id IN (SELECT plugged.meter_id FROM plugged)
        GROUP BY history.meter_id, minute
    ),
    vehicle_minute AS (
        SELECT alone.vehicle_id, alone.meter_id, alone.first_ts, alone.dc, metered.ac
        FROM meter_minute AS alone
        LEFT JOIN metered USING (meter_id, minute)
        WHERE alone.vehicle_id = alone.other_vehicle_id
        UNION ALL
        SELECT plugged.vehicle_id, plugged.meter_id, min(plugged.ts), sum(plugged.kwh_dc), NULL
        FROM meter_minute AS shared
        JOIN plugged ON plugged.meter_id = shared.meter_id AND date_bin('1 minute', plugged.ts, 'epoch') = shared.minute
        WHERE shared.vehicle_id <> shared.other_vehicle_id
        GROUP BY plugged.vehicle_id, plugged.meter_id, shared.minute
    ),
    matched AS (
        SELECT
            run.vehicle_id,
            run.first_ts,
            count(vehicle_minute.ac)::integer AS minutes,
            sum(vehicle_minute.ac) AS ac,
            sum(vehicle_minute.dc) FILTER (WHERE vehicle_minute.ac IS NOT NULL) AS dc,
            max(vehicle_minute.dc) AS peak_kwh
        FROM vehicle_minute
        JOIN run
            ON run.vehicle_id = vehicle_minute.vehicle_id
            AND run.quarter_hour = date_bin('15 minutes', vehicle_minute.first_ts, 'epoch')
            AND run.meter_id = vehicle_minute.meter_id
            AND vehicle_minute.first_ts BETWEEN run.first_ts AND run.last_ts
        GROUP BY run.vehicle_id, run.first_ts
    )
    SELECT
        run.vehicle_id,
        run.quarter_hour,
        run.first_ts,
        run.last_ts,
        run.meter_id,
        run.readings,
        run.kwh_dc,
        coalesce(matched.minutes, 0),
        coalesce(matched.ac, 0),
        coalesce(matched.dc, 0),
        first_reading.soc,
        last_reading.soc,
        coalesce(matched.peak_kwh, 0)
    FROM run
    JOIN plugged AS first_reading ON first_reading.vehicle_id = run.vehicle_id AND first_reading.ts = run.first_ts
    JOIN plugged AS last_reading ON last_reading.vehicle_id = run.vehicle_id AND last_reading.ts = run.last_ts
    LEFT JOIN matched ON matched.vehicle_id = run.vehicle_id AND matched.first_ts = run.first_ts;
END
$$;

COMMENT ON FUNCTION charging_between(timestamptz, timestamptz) IS
    'Runs of all vehicles at meters, of their readings with since <= ts < until, by quarter hour, computed from history alone.';

CREATE OR REPLACE FUNCTION charging_of(vehicles text[], sinces timestamptz[], untils timestamptz[]) RETURNS SETOF charging_quarter_hour
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET jit = off
AS $$
DECLARE
    -- Stands beside each window of a vehicle below, so that partitions outside of all of them are not even planned for.
    earliest timestamptz := (SELECT min(bound) FROM unnest(sinces) AS bound);
    -- (No reading is accepted that is a day ahead.)
    latest   timestamptz := least((SELECT max(bound) FROM unnest(untils) AS bound), now() + '1 day'::interval);
BEGIN
    RETURN QUERY
    WITH piece AS (
        SELECT asked.vehicle_id, asked.since, asked.until, asked.piece
        FROM unnest(charging_of.vehicles, charging_of.sinces, charging_of.untils) WITH ORDINALITY AS asked (vehicle_id, since, until, piece)
    ),
    plugged AS MATERIALIZED (
        SELECT
            piece.piece,
            own.*,
            (lag(own.meter_id) OVER so_far, lag(own.quarter_hour) OVER so_far)
                IS DISTINCT FROM (own.meter_id, own.quarter_hour) AS begins
        FROM piece
        CROSS JOIN LATERAL (
            SELECT
                reading.ts,
                reading.kwh_dc,
                reading.soc,
                reading.meter_id,
                date_bin('15 minutes', reading.ts, 'epoch') AS quarter_hour,
                date_bin('1 minute', reading.ts, 'epoch') AS minute
            FROM vehicle_reading AS reading
            WHERE reading.vehicle_id = piece.vehicle_id
                AND reading.ts >= piece.since AND reading.ts < piece.until
                AND reading.ts >= earliest AND reading.ts < latest
                AND reading.meter_id IS NOT NULL
            OFFSET 0
        ) AS own
        WINDOW so_far AS (PARTITION BY piece.piece ORDER BY own.ts)
    ),
    numbered AS MATERIALIZED (
        SELECT plugged.*, count(*) FILTER (WHERE plugged.begins) OVER (PARTITION BY plugged.piece ORDER BY plugged.ts) AS run
        FROM plugged
    ),
    used AS MATERIALIZED (
        SELECT
            piece.piece,
            piece.vehicle_id,
            meter.meter_id,
            greatest(piece.since, meter.first_minute) AS since,
            least(piece.until, meter.last_minute + '1 minute') AS until
        FROM (
            SELECT plugged.piece, plugged.meter_id, min(plugged.minute) AS first_minute, max(plugged.minute) AS last_minute
            FROM plugged
            GROUP BY plugged.piece, plugged.meter_id
        ) AS meter
        JOIN piece USING (piece)
    ),
    metered AS (
        SELECT used.piece, used.meter_id, date_bin('1 minute', history.ts, 'epoch') AS minute, sum(history.kwh_ac) AS ac
        FROM used
        CROSS JOIN LATERAL (
            SELECT reading.ts, reading.kwh_ac
            FROM meter_history AS reading
            WHERE reading.meter_id = used.meter_id
                AND reading.ts >= used.since AND reading.ts < used.until
                AND reading.ts >= earliest AND reading.ts < latest
            OFFSET 0
        ) AS history
        GROUP BY used.piece, used.meter_id, minute
    ),
    shared AS (
        SELECT used.piece, used.meter_id, date_bin('1 minute', history.ts, 'epoch') AS minute
        FROM used
        CROSS JOIN LATERAL (
            SELECT reading.ts
            FROM vehicle_history AS reading
            WHERE reading.meter_id = used.meter_id
                AND reading.ts >= used.since AND reading.ts < used.until
                AND reading.ts >= earliest AND reading.ts < latest
                AND reading.vehicle_id <> used.vehicle_id
            OFFSET 0
        ) AS history
        UNION
        -- Those that say no meter, and are there by assignment or by the naming rule.
        SELECT used.piece, used.meter_id, date_bin('1 minute', history.ts, 'epoch')
        FROM used
        CROSS JOIN LATERAL (
            SELECT assignment.vehicle_id
            FROM charger_assignment AS assignment
            WHERE assignment.meter_id = used.meter_id
            UNION
            SELECT setting.vehicle_prefix || substr(used.meter_id, length(setting.meter_prefix) + 1)
            FROM analytics_setting AS setting
            WHERE starts_with(used.meter_id, setting.meter_prefix)
        ) AS silent
        CROSS JOIN LATERAL (
            SELECT reading.ts
            FROM vehicle_reading AS reading
            WHERE reading.vehicle_id = silent.vehicle_id
                AND reading.vehicle_id <> used.vehicle_id
                AND reading.ts >= used.since AND reading.ts < used.until
                AND reading.ts >= earliest AND reading.ts < latest
                AND reading.meter_id = used.meter_id
            OFFSET 0
        ) AS history
    ),
    vehicle_minute AS (
        SELECT
            numbered.piece,
            numbered.meter_id,
            numbered.minute,
            min(numbered.run) AS run,
            sum(numbered.kwh_dc) AS dc
        FROM numbered
        GROUP BY numbered.piece, numbered.meter_id, numbered.minute
    ),
    matched AS (
        SELECT
            vehicle_minute.piece,
            vehicle_minute.run,
            count(metered.ac)::integer AS minutes,
            sum(metered.ac) AS ac,
            sum(vehicle_minute.dc) FILTER (WHERE metered.ac IS NOT NULL) AS dc,
            max(vehicle_minute.dc) AS peak_kwh
        FROM vehicle_minute
        LEFT JOIN shared USING (piece, meter_id, minute)
        LEFT JOIN metered
            ON metered.piece = vehicle_minute.piece
            AND metered.meter_id = vehicle_minute.meter_id
            AND metered.minute = vehicle_minute.minute
            AND shared.piece IS NULL
        GROUP BY vehicle_minute.piece, vehicle_minute.run
    ),
    run AS (
        SELECT
            numbered.piece,
            numbered.run,
            numbered.quarter_hour,
            min(numbered.ts) AS first_ts,
            max(numbered.ts) AS last_ts,
            min(numbered.meter_id) AS meter_id,
            count(*)::integer AS readings,
            sum(numbered.kwh_dc) AS kwh_dc,
            (array_agg(numbered.soc ORDER BY numbered.ts))[1] AS soc_from,
            (array_agg(numbered.soc ORDER BY numbered.ts DESC))[1] AS soc_to
        FROM numbered
        GROUP BY numbered.piece, numbered.run, numbered.quarter_hour
    )
    SELECT
        piece.vehicle_id,
        run.quarter_hour,
        run.first_ts,
        run.last_ts,
        run.meter_id,
        run.readings,
        run.kwh_dc,
        coalesce(matched.minutes, 0),
        coalesce(matched.ac, 0),
        coalesce(matched.dc, 0),
        run.soc_from,
        run.soc_to,
        coalesce(matched.peak_kwh, 0)
    FROM run
    JOIN piece USING (piece)
    LEFT JOIN matched USING (piece, run);
END
$$;

COMMENT ON FUNCTION charging_of(text[], timestamptz[], timestamptz[]) IS
    'Runs at meters of the n-th vehicle, of its readings from the n-th since to the n-th until, by quarter hour, computed from history alone.';
