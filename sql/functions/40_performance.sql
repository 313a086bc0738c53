-- How efficiently vehicles charge and chargers work: DC over AC of the matched minutes.

-- Unlike the other functions it has no SET, so that it can be put in place of its call.
CREATE OR REPLACE FUNCTION efficiency_reason(readings bigint, plugged boolean, minutes bigint, ac double precision, dc double precision, least_kwh double precision)
RETURNS text
LANGUAGE sql IMMUTABLE
AS $$
    SELECT CASE
        WHEN coalesce(readings, 0) = 0 THEN 'no readings'
        WHEN NOT coalesce(plugged, false) THEN 'no meter known'
        WHEN minutes = 0 THEN 'no matched minute'
        WHEN ac < least_kwh THEN 'too little energy'
        WHEN dc > ac THEN 'more DC than AC'
    END
$$;

COMMENT ON FUNCTION efficiency_reason(bigint, boolean, bigint, double precision, double precision, double precision) IS
    'Why there is no efficiency of that many readings, matched minutes, kWh AC and DC; NULL where there is one.';

CREATE OR REPLACE FUNCTION finding(ac double precision, dc double precision, threshold double precision, least_kwh double precision) RETURNS text
LANGUAGE sql IMMUTABLE
AS $$
    SELECT CASE
        WHEN ac < least_kwh THEN NULL
        WHEN dc > ac THEN 'mapping or metering fault'
        WHEN dc < threshold * ac THEN 'inefficient'
    END
$$;

COMMENT ON FUNCTION finding(double precision, double precision, double precision, double precision) IS
    'What matched energies of kWh AC and DC point at, given a threshold of the efficiency and a least energy; NULL: nothing.';

CREATE OR REPLACE FUNCTION kwh_left(total double precision, part double precision) RETURNS double precision
LANGUAGE sql IMMUTABLE
AS $$
    -- Less than a millionth of a Wh is what the order of the terms does to a sum of doubles.
    SELECT CASE WHEN abs(total - part) < 1e-9 THEN 0 ELSE total - part END
$$;

COMMENT ON FUNCTION kwh_left(double precision, double precision) IS 'What is left of a total in kWh without a part of it.';

CREATE OR REPLACE FUNCTION vehicle_runs(vehicle text, since timestamptz DEFAULT '-infinity', until timestamptz DEFAULT 'infinity')
RETURNS SETOF charging_quarter_hour
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET enable_seqscan = off
SET jit = off
AS $$
DECLARE
    closed tstzrange;
    marked tstzmultirange;
    rolled tstzmultirange;
BEGIN
    IF since >= until THEN
        RETURN;
    END IF;
    closed := rolled_up(since, until);
    -- Marks of a meter where it was at any time of the window: more than needed, but seldom, and the answer is the same.
    SELECT coalesce(range_agg(mark.quarter_hours), '{}') INTO marked
    FROM rollup_mark AS mark
    WHERE (mark.device_id = vehicle AND mark.kind = 'vehicle')
        OR (
            mark.kind = 'meter'
            AND mark.device_id IN (
                SELECT rollup.meter_id
                FROM charging_quarter_hour AS rollup
                WHERE rollup.vehicle_id = vehicle AND rollup.quarter_hour >= lower(closed) AND rollup.quarter_hour < upper(closed)
            )
        );
    rolled := tstzmultirange(closed) - marked;
    RETURN QUERY
    SELECT rollup.*
    FROM charging_quarter_hour AS rollup
    WHERE rollup.vehicle_id = vehicle_runs.vehicle
        AND rollup.quarter_hour >= lower(rolled) AND rollup.quarter_hour < upper(rolled)
        AND rolled @> rollup.quarter_hour;
    RETURN QUERY
    SELECT edge.*
    FROM (
        SELECT array_agg(vehicle) AS vehicles, array_agg(lower(part)) AS sinces, array_agg(upper(part)) AS untils
        FROM unnest(tstzmultirange(tstzrange(since, until)) - rolled) AS part
    ) AS pieces
    CROSS JOIN LATERAL charging_of(pieces.vehicles, pieces.sinces, pieces.untils) AS edge;
END
$$;

COMMENT ON FUNCTION vehicle_runs(text, timestamptz, timestamptz) IS
    'Runs of a vehicle at meters, of its readings with since <= ts < until; exact at any moment. Columns as in charging_quarter_hour.';

CREATE OR REPLACE FUNCTION marked_vehicles(closed tstzrange) RETURNS TABLE (vehicle_id text, quarter_hours tstzmultirange)
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    SELECT concerned.vehicle_id, range_agg(concerned.quarter_hours) * tstzmultirange(marked_vehicles.closed)
    FROM (
        SELECT mark.device_id AS vehicle_id, mark.quarter_hours
        FROM rollup_mark AS mark
        WHERE mark.kind = 'vehicle' AND mark.quarter_hours && marked_vehicles.closed
        UNION ALL
        SELECT rollup.vehicle_id, tstzrange(rollup.quarter_hour, rollup.quarter_hour + '15 minutes'::interval)
        FROM rollup_mark AS mark
        CROSS JOIN LATERAL (
            SELECT inside.vehicle_id, inside.quarter_hour
            FROM charging_quarter_hour AS inside
            WHERE inside.meter_id = mark.device_id
                AND inside.quarter_hour >= lower(mark.quarter_hours * marked_vehicles.closed)
                AND inside.quarter_hour < upper(mark.quarter_hours * marked_vehicles.closed)
                AND inside.quarter_hour >= lower(marked_vehicles.closed) AND inside.quarter_hour < upper(marked_vehicles.closed)
            OFFSET 0
        ) AS rollup
        WHERE mark.kind = 'meter' AND mark.quarter_hours && marked_vehicles.closed
    ) AS concerned
    GROUP BY concerned.vehicle_id
$$;

COMMENT ON FUNCTION marked_vehicles(tstzrange) IS 'The vehicles whose charging rollups are not true any more within a time, and in which quarter hours of it.';

CREATE OR REPLACE FUNCTION fleet_runs(since timestamptz, until timestamptz) RETURNS SETOF charging_quarter_hour
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET jit = off
SET work_mem = '64MB'
AS $$
DECLARE
    closed tstzrange;
    piece  tstzrange;
BEGIN
    IF since >= until THEN
        RETURN;
    END IF;
    closed := rolled_up(since, until);
    RETURN QUERY
    SELECT rollup.*
    FROM charging_quarter_hour AS rollup
    LEFT JOIN marked_vehicles(closed) AS late USING (vehicle_id)
    WHERE rollup.quarter_hour >= lower(closed) AND rollup.quarter_hour < upper(closed)
        AND (late.quarter_hours @> rollup.quarter_hour) IS NOT TRUE;
    RETURN QUERY
    SELECT again.*
    FROM (
        SELECT array_agg(late.vehicle_id) AS vehicles, array_agg(lower(late_piece)) AS sinces, array_agg(upper(late_piece)) AS untils
        FROM marked_vehicles(closed) AS late
        CROSS JOIN LATERAL unnest(late.quarter_hours) AS late_piece
    ) AS pieces
    CROSS JOIN LATERAL charging_of(pieces.vehicles, pieces.sinces, pieces.untils) AS again;
    FOR piece IN SELECT unnest(tstzmultirange(tstzrange(since, until)) - tstzmultirange(closed)) LOOP
        RETURN QUERY SELECT * FROM charging_between(lower(piece), upper(piece));
    END LOOP;
END
$$;

COMMENT ON FUNCTION fleet_runs(timestamptz, timestamptz) IS
    'Runs of all vehicles at meters, of their readings with since <= ts < until; exact at any moment. Columns as in charging_quarter_hour.';

-- The same summed up, two hours at a time where they are whole: what makes a day of a large fleet quick.
CREATE OR REPLACE FUNCTION fleet_charging(since timestamptz, until timestamptz, charged_only boolean DEFAULT false)
RETURNS TABLE (vehicle_id text, meter_id text, minutes bigint, matched_ac double precision, matched_dc double precision)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET jit = off
SET work_mem = '64MB'
AS $$
#variable_conflict use_column
DECLARE
    closed      tstzrange;
    first_block timestamptz;
    end_block   timestamptz;
    marked_ids  text[];
    vehicles    text[];
    sinces      timestamptz[];
    untils      timestamptz[];
BEGIN
    IF since >= until THEN
        RETURN;
    END IF;
    closed := rolled_up(since, until);
    first_block := date_bin('2 hours', lower(closed) + '2 hours' - '1 microsecond'::interval, 'epoch');
    end_block := date_bin('2 hours', upper(closed), 'epoch');
    IF first_block > end_block THEN
        first_block := lower(closed);
        end_block := first_block;
    END IF;
    SELECT
        coalesce(array_agg(DISTINCT marked.vehicle_id), '{}'),
        array_agg(marked.vehicle_id),
        array_agg(lower(marked.piece)),
        array_agg(upper(marked.piece))
    INTO marked_ids, vehicles, sinces, untils
    FROM (SELECT vehicle_id, unnest(quarter_hours) AS piece FROM marked_vehicles(closed)) AS marked;
    RETURN QUERY
    WITH part AS (
        SELECT rollup.vehicle_id, rollup.meter_id, rollup.minutes, rollup.matched_ac, rollup.matched_dc
        FROM charging_two_hours AS rollup
        WHERE rollup.two_hours >= first_block AND rollup.two_hours < end_block AND rollup.vehicle_id <> ALL (marked_ids)
            AND (NOT charged_only OR rollup.matched_ac > 0 OR rollup.matched_dc > 0)
        UNION ALL
        SELECT rollup.vehicle_id, rollup.meter_id, rollup.minutes, rollup.matched_ac, rollup.matched_dc
        FROM charging_quarter_hour AS rollup
        WHERE rollup.quarter_hour >= lower(closed) AND rollup.quarter_hour < first_block AND rollup.vehicle_id <> ALL (marked_ids)
            AND (NOT charged_only OR rollup.matched_ac > 0 OR rollup.matched_dc > 0)
        UNION ALL
        SELECT rollup.vehicle_id, rollup.meter_id, rollup.minutes, rollup.matched_ac, rollup.matched_dc
        FROM charging_quarter_hour AS rollup
        WHERE rollup.quarter_hour >= end_block AND rollup.quarter_hour < upper(closed) AND rollup.vehicle_id <> ALL (marked_ids)
            AND (NOT charged_only OR rollup.matched_ac > 0 OR rollup.matched_dc > 0)
        UNION ALL
        -- Marked vehicles: what is not marked of them, and the rest from history.
        SELECT marked.vehicle_id, rollup.meter_id, rollup.minutes, rollup.matched_ac, rollup.matched_dc
        FROM (
            SELECT piece.vehicle_id, range_agg(tstzrange(piece.since, piece.until)) AS quarter_hours
            FROM unnest(vehicles, sinces, untils) AS piece (vehicle_id, since, until)
            GROUP BY piece.vehicle_id
        ) AS marked
        CROSS JOIN LATERAL (
            SELECT inside.meter_id, inside.minutes, inside.matched_ac, inside.matched_dc
            FROM charging_quarter_hour AS inside
            WHERE inside.vehicle_id = marked.vehicle_id
                AND inside.quarter_hour >= lower(closed) AND inside.quarter_hour < upper(closed)
                AND NOT marked.quarter_hours @> inside.quarter_hour
            OFFSET 0
        ) AS rollup
        UNION ALL
        SELECT again.vehicle_id, again.meter_id, again.minutes, again.matched_ac, again.matched_dc
        FROM charging_of(vehicles, sinces, untils) AS again
        WHERE vehicles IS NOT NULL
        UNION ALL
        SELECT edge.vehicle_id, edge.meter_id, edge.minutes, edge.matched_ac, edge.matched_dc
        FROM unnest(tstzmultirange(tstzrange(fleet_charging.since, fleet_charging.until)) - tstzmultirange(closed)) AS piece
        CROSS JOIN LATERAL charging_between(lower(piece), upper(piece)) AS edge
    )
    SELECT part.vehicle_id, part.meter_id, sum(part.minutes)::bigint, sum(part.matched_ac), sum(part.matched_dc)
    FROM part
    GROUP BY part.vehicle_id, part.meter_id
    HAVING NOT charged_only OR sum(part.matched_ac) > 0 OR sum(part.matched_dc) > 0;
END
$$;

COMMENT ON FUNCTION fleet_charging(timestamptz, timestamptz, boolean) IS
    'Where vehicles were plugged in, with the matched minutes and their energy in kWh, of readings with since <= ts < until; exact at any moment. charged_only: only where energy flowed in matched minutes; then minutes without are counted or not.';

CREATE OR REPLACE FUNCTION vehicle_performance(
    vehicle text, since timestamptz DEFAULT now() - interval '24 hours', until timestamptz DEFAULT 'infinity'
)
RETURNS TABLE (
    vehicle_id          text,
    readings            bigint,
    matched_minutes     bigint,
    kwh_ac              double precision,
    kwh_dc              double precision,
    efficiency          double precision,
    loss_kwh            double precision,
    reason              text,
    unattributed_kwh_dc double precision,
    avg_soc             double precision,
    last_soc            double precision,
    avg_battery_temp    double precision,
    max_battery_temp    double precision,
    meters              text[]
)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    -- What is taken from rollups; the rest of the window is read from history.
    rolled  tstzmultirange := tstzmultirange(rolled_up(since, until));
    rollup  record;
    edge    record;
    minutes bigint           := 0;
    ac      double precision := 0;
    dc      double precision := 0;
    newest  double precision;
BEGIN
    -- With what is marked by now of the vehicle and of meters where it was, and if anything is, again without it. (A mark
    -- of another device that is called the same does no harm: more is read from history, and the answer is the same.)
    LOOP
        SELECT * INTO rollup
        FROM (
            SELECT
                coalesce(sum(quarter.readings), 0) AS readings,
                coalesce(sum(quarter.kwh_dc), 0) AS kwh_dc,
                coalesce(sum(quarter.soc_sum), 0) AS soc_sum,
                coalesce(sum(quarter.temp_sum), 0) AS temp_sum,
                max(quarter.temp_max) AS temp_max
            FROM vehicle_quarter_hour AS quarter
            WHERE quarter.vehicle_id = vehicle
                AND quarter.quarter_hour >= lower(rolled) AND quarter.quarter_hour < upper(rolled)
                AND rolled @> quarter.quarter_hour
        ) AS own
        CROSS JOIN (
            SELECT
                coalesce(sum(run.minutes), 0) AS minutes,
                coalesce(sum(run.matched_ac), 0) AS ac,
                coalesce(sum(run.matched_dc), 0) AS dc,
                coalesce(array_agg(DISTINCT run.meter_id), '{}') AS meters
            FROM charging_quarter_hour AS run
            WHERE run.vehicle_id = vehicle
                AND run.quarter_hour >= lower(rolled) AND run.quarter_hour < upper(rolled)
                AND rolled @> run.quarter_hour
        ) AS charged
        CROSS JOIN LATERAL (
            SELECT range_agg(mark.quarter_hours) AS marked
            FROM rollup_mark AS mark
            WHERE mark.device_id = ANY (vehicle || charged.meters)
        ) AS late;
        EXIT WHEN (rolled && rollup.marked) IS NOT TRUE;
        rolled := rolled - rollup.marked;
    END LOOP;

    SELECT
        count(*) AS readings,
        coalesce(sum(reading.kwh_dc), 0) AS kwh_dc,
        coalesce(sum(reading.soc), 0) AS soc_sum,
        coalesce(sum(reading.battery_temp), 0) AS temp_sum,
        max(reading.battery_temp) AS temp_max,
        coalesce(array_agg(DISTINCT reading.meter_id) FILTER (WHERE reading.meter_id IS NOT NULL), '{}') AS meters,
        range_agg(piece) FILTER (WHERE reading.meter_id IS NOT NULL) AS plugged
    INTO edge
    FROM unnest(
        tstzmultirange(tstzrange(vehicle_performance.since, greatest(vehicle_performance.since, vehicle_performance.until))) - rolled
    ) AS piece
    CROSS JOIN LATERAL (
        SELECT reading.kwh_dc, reading.soc, reading.battery_temp, reading.meter_id
        FROM vehicle_reading AS reading
        WHERE reading.vehicle_id = vehicle
            AND reading.ts >= lower(piece) AND reading.ts < upper(piece)
            -- Partitions outside of the window are not looked at.
            AND reading.ts >= vehicle_performance.since AND reading.ts < vehicle_performance.until
        OFFSET 0
    ) AS reading;

    -- Most of the work, and a parked vehicle has none of it.
    IF edge.plugged IS NOT NULL THEN
        SELECT coalesce(sum(run.minutes), 0), coalesce(sum(run.matched_ac), 0), coalesce(sum(run.matched_dc), 0)
        INTO minutes, ac, dc
        FROM (
            SELECT array_agg(vehicle) AS vehicles, array_agg(lower(piece)) AS sinces, array_agg(upper(piece)) AS untils
            FROM unnest(edge.plugged) AS piece
        ) AS pieces
        CROSS JOIN LATERAL charging_of(pieces.vehicles, pieces.sinces, pieces.untils) AS run;
    END IF;
    minutes := minutes + rollup.minutes;
    ac := ac + rollup.ac;
    dc := dc + rollup.dc;

    SELECT live.soc INTO newest
    FROM vehicle_live AS live
    WHERE live.vehicle_id = vehicle AND live.ts >= vehicle_performance.since AND live.ts < vehicle_performance.until;
    IF NOT FOUND THEN
        SELECT history.soc INTO newest
        FROM vehicle_history AS history
        WHERE history.vehicle_id = vehicle
            AND history.ts >= vehicle_performance.since AND history.ts < vehicle_performance.until
        ORDER BY history.ts DESC
        LIMIT 1;
    END IF;

    RETURN QUERY
    SELECT
        vehicle,
        own.readings,
        minutes,
        ac,
        dc,
        CASE WHEN why.reason IS NULL THEN dc / ac END,
        CASE WHEN why.reason IS NULL THEN ac - dc END,
        why.reason,
        kwh_left(rollup.kwh_dc + edge.kwh_dc, dc),
        (rollup.soc_sum + edge.soc_sum) / nullif(own.readings, 0),
        newest,
        (rollup.temp_sum + edge.temp_sum) / nullif(own.readings, 0),
        greatest(rollup.temp_max, edge.temp_max),
        own.meters
    FROM (
        SELECT
            rollup.readings + edge.readings AS readings,
            ARRAY(SELECT DISTINCT meter FROM unnest(rollup.meters || edge.meters) AS meter ORDER BY meter) AS meters
    ) AS own
    CROSS JOIN analytics_setting AS setting
    CROSS JOIN LATERAL efficiency_reason(
        own.readings, own.meters <> '{}', minutes, ac, dc, setting.efficiency_least_kwh
    ) AS why (reason);
END
$$;

COMMENT ON FUNCTION vehicle_performance(text, timestamptz, timestamptz) IS
    'How efficiently a vehicle charged, of its readings with since <= ts < until (default: the last 24 hours, up to this moment). One row; columns as in vehicle_performance_24h.';

CREATE OR REPLACE FUNCTION fleet_performance(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (
    vehicle_id          text,
    readings            bigint,
    matched_minutes     bigint,
    kwh_ac              double precision,
    kwh_dc              double precision,
    efficiency          double precision,
    loss_kwh            double precision,
    reason              text,
    unattributed_kwh_dc double precision,
    avg_soc             double precision,
    last_soc            double precision,
    avg_battery_temp    double precision,
    max_battery_temp    double precision,
    meters              text[]
)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET jit = off
SET work_mem = '64MB'
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT
        own.vehicle_id,
        own.readings,
        coalesce(charged.minutes, 0),
        coalesce(charged.ac, 0),
        coalesce(charged.dc, 0),
        CASE WHEN why.reason IS NULL THEN charged.dc / charged.ac END,
        CASE WHEN why.reason IS NULL THEN charged.ac - charged.dc END,
        why.reason,
        kwh_left(own.kwh_dc, coalesce(charged.dc, 0)),
        own.soc_sum / own.readings,
        newest.soc,
        own.temp_sum / own.readings,
        own.temp_max,
        coalesce(charged.meters, '{}')
    FROM vehicle_totals(fleet_performance.since, fleet_performance.until) AS own
    LEFT JOIN (
        SELECT
            part.vehicle_id,
            sum(part.minutes)::bigint AS minutes,
            sum(part.matched_ac) AS ac,
            sum(part.matched_dc) AS dc,
            array_agg(part.meter_id ORDER BY part.meter_id) AS meters
        FROM fleet_charging(fleet_performance.since, fleet_performance.until) AS part
        GROUP BY part.vehicle_id
    ) AS charged USING (vehicle_id)
    -- The newest reading of a vehicle is its live row, unless the window ends before it.
    LEFT JOIN vehicle_live AS live
        ON live.vehicle_id = own.vehicle_id AND live.ts >= fleet_performance.since AND live.ts < fleet_performance.until
    LEFT JOIN LATERAL (
        SELECT live.soc
        WHERE live.vehicle_id IS NOT NULL
        UNION ALL
        (
            SELECT history.soc
            FROM vehicle_history AS history
            WHERE live.vehicle_id IS NULL
                AND history.vehicle_id = own.vehicle_id
                AND history.ts >= own.last_quarter_hour
                AND history.ts >= fleet_performance.since AND history.ts < fleet_performance.until
            ORDER BY history.ts DESC
            LIMIT 1
        )
    ) AS newest ON true
    CROSS JOIN analytics_setting AS setting
    CROSS JOIN LATERAL efficiency_reason(
        own.readings, charged.meters IS NOT NULL, charged.minutes, charged.ac, charged.dc, setting.efficiency_least_kwh
    ) AS why (reason);
END
$$;

COMMENT ON FUNCTION fleet_performance(timestamptz, timestamptz) IS
    'How efficiently each vehicle charged that has readings with since <= ts < until. Columns as in vehicle_performance_24h.';

CREATE OR REPLACE FUNCTION fleet_chargers(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (
    meter_id            text,
    readings            bigint,
    matched_minutes     bigint,
    kwh_ac              double precision,
    kwh_dc              double precision,
    efficiency          double precision,
    loss_kwh            double precision,
    reason              text,
    finding             text,
    unattributed_kwh_ac double precision,
    vehicles            text[]
)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET jit = off
SET work_mem = '64MB'
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT
        meter_id,
        coalesce(own.readings, 0),
        coalesce(charged.minutes, 0),
        coalesce(charged.ac, 0),
        coalesce(charged.dc, 0),
        CASE WHEN why.reason IS NULL THEN charged.dc / charged.ac END,
        CASE WHEN why.reason IS NULL THEN charged.ac - charged.dc END,
        replace(why.reason, 'no meter known', 'no vehicle known'),
        finding(charged.ac, charged.dc, setting.inefficient_below, greatest(setting.inefficient_least_kwh, setting.efficiency_least_kwh)),
        kwh_left(coalesce(own.kwh_ac, 0), coalesce(charged.ac, 0)),
        coalesce(charged.vehicles, '{}')
    FROM meter_totals(fleet_chargers.since, fleet_chargers.until) AS own
    FULL JOIN (
        SELECT
            part.meter_id,
            sum(part.minutes)::bigint AS minutes,
            sum(part.matched_ac) AS ac,
            sum(part.matched_dc) AS dc,
            array_agg(part.vehicle_id ORDER BY part.vehicle_id) AS vehicles
        FROM fleet_charging(fleet_chargers.since, fleet_chargers.until) AS part
        GROUP BY part.meter_id
    ) AS charged USING (meter_id)
    CROSS JOIN analytics_setting AS setting
    CROSS JOIN LATERAL efficiency_reason(
        own.readings, charged.vehicles IS NOT NULL, charged.minutes, charged.ac, charged.dc, setting.efficiency_least_kwh
    ) AS why (reason);
END
$$;

COMMENT ON FUNCTION fleet_chargers(timestamptz, timestamptz) IS
    'How efficiently vehicles charged at each meter that has readings with since <= ts < until, or that a vehicle named. Columns as in charger_performance_24h.';

CREATE OR REPLACE FUNCTION fleet_summary(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (
    meters_reporting    bigint,
    vehicles_reporting  bigint,
    kwh_ac              double precision,
    kwh_dc              double precision,
    loss_kwh            double precision,
    efficiency          double precision,
    reason              text,
    unattributed_kwh_ac double precision,
    unattributed_kwh_dc double precision
)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET jit = off
SET work_mem = '64MB'
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT
        metered.meters,
        driven.vehicles,
        metered.kwh_ac,
        driven.kwh_dc,
        CASE WHEN why.reason IS NULL THEN metered.kwh_ac - driven.kwh_dc END,
        CASE WHEN why.reason IS NULL THEN driven.kwh_dc / metered.kwh_ac END,
        why.reason,
        kwh_left(metered.kwh_ac, matched.ac),
        kwh_left(driven.kwh_dc, matched.dc)
    FROM (
        SELECT count(*) AS meters, coalesce(sum(meter.readings), 0)::bigint AS readings, coalesce(sum(meter.kwh_ac), 0) AS kwh_ac
        FROM meter_totals(fleet_summary.since, fleet_summary.until) AS meter
    ) AS metered
    CROSS JOIN (
        SELECT count(*) AS vehicles, coalesce(sum(vehicle.readings), 0)::bigint AS readings, coalesce(sum(vehicle.kwh_dc), 0) AS kwh_dc
        FROM vehicle_totals(fleet_summary.since, fleet_summary.until) AS vehicle
    ) AS driven
    CROSS JOIN (
        SELECT coalesce(sum(part.matched_ac), 0) AS ac, coalesce(sum(part.matched_dc), 0) AS dc
        FROM fleet_charging(fleet_summary.since, fleet_summary.until) AS part
    ) AS matched
    CROSS JOIN analytics_setting AS setting
    CROSS JOIN LATERAL efficiency_reason(
        metered.readings + driven.readings, true, 1, metered.kwh_ac, driven.kwh_dc, setting.efficiency_least_kwh
    ) AS why (reason);
END
$$;

COMMENT ON FUNCTION fleet_summary(timestamptz, timestamptz) IS
    'The whole fleet, of its readings with since <= ts < until. One row; columns as in fleet_summary_24h.';
