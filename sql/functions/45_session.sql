-- Charging sessions: runs at one meter, one after the other, none longer than session_gap after the one before.

CREATE OR REPLACE FUNCTION charging_sessions(
    vehicle text, since timestamptz DEFAULT '-infinity', until timestamptz DEFAULT 'infinity'
)
RETURNS TABLE (
    vehicle_id      text,
    meter_id        text,
    started         timestamptz,
    ended           timestamptz,
    readings        bigint,
    matched_minutes bigint,
    kwh_ac          double precision,
    kwh_dc          double precision,
    efficiency      double precision,
    reason          text,
    mean_kw         double precision,
    peak_kw         double precision,
    soc_from        double precision,
    soc_to          double precision
)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET jit = off
SET work_mem = '64MB'
AS $$
#variable_conflict use_column
DECLARE
    setting analytics_setting := (SELECT analytics_setting FROM analytics_setting);
    -- Sessions are whole: the runs looked at reach beyond the window, for one vehicle to where it was silent.
    begin_ts timestamptz := date_bin('15 minutes', since, 'epoch') - CASE WHEN vehicle IS NULL THEN '2 days' ELSE '0' END::interval;
    end_ts   timestamptz := date_bin('15 minutes', until, 'epoch') + CASE WHEN vehicle IS NULL THEN '2 days' ELSE '15 minutes' END::interval;
    look     interval    := greatest('6 hours', 2 * setting.session_gap);
    silent   timestamptz;
BEGIN
    IF since >= until THEN
        RETURN;
    END IF;
    IF vehicle IS NOT NULL THEN
        WHILE isfinite(begin_ts) AND EXISTS (SELECT FROM vehicle_runs(vehicle, begin_ts - setting.session_gap, begin_ts)) LOOP
            SELECT date_bin('15 minutes', max(beginning.first_ts), 'epoch') INTO silent
            FROM (
                SELECT run.first_ts, lag(run.last_ts, 1, begin_ts - look) OVER (ORDER BY run.first_ts) AS before
                FROM vehicle_runs(vehicle, begin_ts - look, begin_ts) AS run
            ) AS beginning
            WHERE beginning.first_ts - beginning.before > setting.session_gap;
            begin_ts := coalesce(silent, begin_ts - look);
        END LOOP;
        WHILE isfinite(end_ts) AND EXISTS (SELECT FROM vehicle_runs(vehicle, end_ts, end_ts + setting.session_gap)) LOOP
            SELECT date_bin('15 minutes', min(ending.last_ts), 'epoch') + '15 minutes'::interval INTO silent
            FROM (
                SELECT run.last_ts, lead(run.first_ts, 1, end_ts + look) OVER (ORDER BY run.first_ts) AS after
                FROM vehicle_runs(vehicle, end_ts, end_ts + look) AS run
            ) AS ending
            WHERE ending.after - ending.last_ts > setting.session_gap;
            end_ts := coalesce(silent, end_ts + look);
        END LOOP;
    END IF;
    RETURN QUERY
    WITH run AS (
        SELECT * FROM vehicle_runs(vehicle, begin_ts, end_ts) WHERE charging_sessions.vehicle IS NOT NULL
        UNION ALL
        SELECT * FROM fleet_runs(begin_ts, end_ts) WHERE charging_sessions.vehicle IS NULL
    ),
    edged AS (
        SELECT
            run.*,
            lag(run.meter_id) OVER own IS DISTINCT FROM run.meter_id
                OR run.first_ts - lag(run.last_ts) OVER own > setting.session_gap AS begins,
            lead(run.meter_id) OVER own IS DISTINCT FROM run.meter_id
                OR lead(run.first_ts) OVER own - run.last_ts > setting.session_gap AS ends
        FROM run
        WINDOW own AS (PARTITION BY run.vehicle_id ORDER BY run.first_ts)
    ),
    numbered AS (
        SELECT edged.*, count(*) FILTER (WHERE edged.begins) OVER (PARTITION BY edged.vehicle_id ORDER BY edged.first_ts) AS session
        FROM edged
    ),
    session AS MATERIALIZED (
        SELECT
            numbered.vehicle_id,
            min(numbered.meter_id) AS meter_id,
            min(numbered.first_ts) AS started,
            max(numbered.last_ts) AS ended,
            sum(numbered.readings)::bigint AS readings,
            sum(numbered.minutes)::bigint AS minutes,
            sum(numbered.matched_ac) AS ac,
            sum(numbered.matched_dc) AS dc,
            sum(numbered.kwh_dc) AS kwh_dc,
            max(numbered.peak_kwh) AS peak_kwh,
            max(numbered.soc_from) FILTER (WHERE numbered.begins) AS soc_from,
            max(numbered.soc_to) FILTER (WHERE numbered.ends) AS soc_to
        FROM numbered
        GROUP BY numbered.vehicle_id, numbered.session
        HAVING max(numbered.last_ts) >= charging_sessions.since AND min(numbered.first_ts) < charging_sessions.until
    ),
    -- Only where all vehicles are asked for: those plugged in for so long that the session may have begun before all that was looked at.
    longer AS (
        SELECT DISTINCT session.vehicle_id
        FROM session
        WHERE charging_sessions.vehicle IS NULL
            AND (session.started < begin_ts + setting.session_gap OR session.ended >= end_ts - setting.session_gap)
    )
    SELECT
        session.vehicle_id,
        session.meter_id,
        session.started,
        session.ended,
        session.readings,
        session.minutes,
        session.ac,
        session.kwh_dc,
        CASE WHEN why.reason IS NULL THEN session.dc / session.ac END,
        why.reason,
        session.kwh_dc / (extract(epoch FROM session.ended - session.started + setting.reading_interval) / 3600),
        session.peak_kwh * 60 / greatest(1, extract(epoch FROM setting.reading_interval) / 60),
        session.soc_from,
        session.soc_to
    FROM session
    CROSS JOIN LATERAL efficiency_reason(
        session.readings, true, session.minutes, session.ac, session.dc, setting.efficiency_least_kwh
    ) AS why (reason)
    WHERE session.vehicle_id NOT IN (SELECT longer.vehicle_id FROM longer)
    UNION ALL
    SELECT again.*
    FROM longer
    CROSS JOIN LATERAL charging_sessions(longer.vehicle_id, charging_sessions.since, charging_sessions.until) AS again
    ORDER BY 1, 3;
END
$$;

COMMENT ON FUNCTION charging_sessions(text, timestamptz, timestamptz) IS
    'The charging sessions of a vehicle (NULL: of all) that overlap since to until, whole, in order of time. Columns as in charging_session.';

CREATE OR REPLACE FUNCTION charger_sessions(
    meter text, since timestamptz DEFAULT '-infinity', until timestamptz DEFAULT 'infinity'
)
RETURNS TABLE (
    vehicle_id      text,
    meter_id        text,
    started         timestamptz,
    ended           timestamptz,
    readings        bigint,
    matched_minutes bigint,
    kwh_ac          double precision,
    kwh_dc          double precision,
    efficiency      double precision,
    reason          text,
    mean_kw         double precision,
    peak_kw         double precision,
    soc_from        double precision,
    soc_to          double precision
)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    IF since >= until THEN
        RETURN;
    END IF;
    RETURN QUERY
    SELECT session.*
    FROM analytics_setting AS setting
    -- A session may reach over a short window and have its readings before and after it.
    CROSS JOIN LATERAL meter_vehicles(meter, charger_sessions.since - setting.session_gap, charger_sessions.until) AS vehicle
    CROSS JOIN LATERAL charging_sessions(vehicle, charger_sessions.since, charger_sessions.until) AS session
    WHERE session.meter_id = meter
    ORDER BY session.vehicle_id, session.started;
END
$$;

COMMENT ON FUNCTION charger_sessions(text, timestamptz, timestamptz) IS
    'The charging sessions at a meter that overlap since to until, whole, by vehicle and time. Columns as in charging_session.';
