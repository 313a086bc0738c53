-- One charger, quickly: the same answers as those of the whole fleet, computed for the vehicles that were there alone.
-- And which of charger and vehicle is at fault.

CREATE OR REPLACE FUNCTION meter_vehicles(meter text, since timestamptz, until timestamptz) RETURNS SETOF text
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_generic_plan
SET enable_seqscan = off
SET jit = off
AS $$
DECLARE
    closed   tstzrange;
    unknown  tstzmultirange;
    earliest timestamptz;
    -- (No reading is accepted that is a day ahead.)
    latest   timestamptz := least(until, now() + '1 day'::interval);
BEGIN
    IF since >= until THEN
        RETURN;
    END IF;
    closed := rolled_up(since, until);
    -- Where some vehicle is marked it may have been here, and the rollups do not know it: the mark of the meter may be done with already.
    SELECT tstzmultirange(tstzrange(since, until)) - (tstzmultirange(closed) - coalesce(range_agg(mark.quarter_hours), '{}')) INTO unknown
    FROM rollup_mark AS mark
    WHERE mark.quarter_hours && closed AND (mark.kind = 'vehicle' OR mark.device_id = meter);
    earliest := lower(unknown);
    RETURN QUERY
    SELECT rollup.vehicle_id
    FROM charging_quarter_hour AS rollup
    WHERE rollup.meter_id = meter AND rollup.quarter_hour >= lower(closed) AND rollup.quarter_hour < upper(closed)
    UNION
    SELECT reading.vehicle_id
    FROM unnest(unknown) AS piece
    CROSS JOIN LATERAL (
        SELECT history.vehicle_id
        FROM vehicle_history AS history
        WHERE history.meter_id = meter
            AND history.ts >= lower(piece) AND history.ts < upper(piece)
            AND history.ts >= earliest AND history.ts < latest
        OFFSET 0
    ) AS reading
    UNION
    SELECT assignment.vehicle_id
    FROM charger_assignment AS assignment
    WHERE assignment.meter_id = meter AND assignment.valid && tstzrange(meter_vehicles.since, meter_vehicles.until)
    UNION
    SELECT setting.vehicle_prefix || substr(meter, length(setting.meter_prefix) + 1)
    FROM analytics_setting AS setting
    WHERE starts_with(meter, setting.meter_prefix);
END
$$;

COMMENT ON FUNCTION meter_vehicles(text, timestamptz, timestamptz) IS
    'All vehicles that may have been plugged in at a meter between two times: those that were, and some that were not.';

CREATE OR REPLACE FUNCTION meter_runs(meter text, since timestamptz, until timestamptz) RETURNS SETOF charging_quarter_hour
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET jit = off
AS $$
BEGIN
    RETURN QUERY
    SELECT run.*
    FROM meter_vehicles(meter, since, until) AS vehicle
    CROSS JOIN LATERAL vehicle_runs(vehicle, since, until) AS run
    WHERE run.meter_id = meter;
END
$$;

COMMENT ON FUNCTION meter_runs(text, timestamptz, timestamptz) IS
    'Runs of all vehicles at one meter, of their readings with since <= ts < until; exact at any moment. Columns as in charging_quarter_hour.';

CREATE OR REPLACE FUNCTION charger_vehicles(
    meter text, since timestamptz DEFAULT now() - interval '24 hours', until timestamptz DEFAULT 'infinity'
)
RETURNS TABLE (
    vehicle_id      text,
    matched_minutes bigint,
    kwh_ac          double precision,
    kwh_dc          double precision,
    efficiency      double precision,
    reason          text,
    loss_kwh        double precision,
    first_seen      timestamptz,
    last_seen       timestamptz
)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT
        part.vehicle_id,
        part.minutes,
        part.ac,
        part.dc,
        CASE WHEN why.reason IS NULL THEN part.dc / part.ac END,
        why.reason,
        CASE WHEN why.reason IS NULL THEN part.ac - part.dc END,
        part.first_ts,
        part.last_ts
    FROM (
        SELECT
            run.vehicle_id,
            sum(run.readings) AS readings,
            sum(run.minutes)::bigint AS minutes,
            sum(run.matched_ac) AS ac,
            sum(run.matched_dc) AS dc,
            min(run.first_ts) AS first_ts,
            max(run.last_ts) AS last_ts
        FROM meter_runs(meter, charger_vehicles.since, charger_vehicles.until) AS run
        GROUP BY run.vehicle_id
    ) AS part
    CROSS JOIN analytics_setting AS setting
    CROSS JOIN LATERAL efficiency_reason(part.readings, true, part.minutes, part.ac, part.dc, setting.efficiency_least_kwh) AS why (reason)
    ORDER BY part.vehicle_id;
END
$$;

COMMENT ON FUNCTION charger_vehicles(text, timestamptz, timestamptz) IS
    'The vehicles that were plugged in at a meter, of their readings with since <= ts < until (default: the last 24 hours, up to this moment). Columns: '
    'vehicle_id, matched_minutes, kwh_ac, kwh_dc (energy of the matched minutes, in kWh), efficiency (kwh_dc / kwh_ac; NULL where it means nothing), '
    'reason (why there is none: no matched minute, too little energy, more DC than AC), loss_kwh (kwh_ac - kwh_dc; NULL with the efficiency), '
    'first_seen and last_seen (its first and last reading there).';

CREATE OR REPLACE FUNCTION charger_performance(
    meter text, since timestamptz DEFAULT now() - interval '24 hours', until timestamptz DEFAULT 'infinity'
)
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
SET jit = off
AS $$
#variable_conflict use_column
BEGIN
    RETURN QUERY
    SELECT
        meter,
        own.readings,
        charged.minutes,
        charged.ac,
        charged.dc,
        CASE WHEN why.reason IS NULL THEN charged.dc / charged.ac END,
        CASE WHEN why.reason IS NULL THEN charged.ac - charged.dc END,
        replace(why.reason, 'no meter known', 'no vehicle known'),
        finding(charged.ac, charged.dc, setting.inefficient_below, greatest(setting.inefficient_least_kwh, setting.efficiency_least_kwh)),
        kwh_left(own.kwh_ac, charged.ac),
        charged.vehicles
    FROM (
        SELECT coalesce(sum(quarter.readings), 0)::bigint AS readings, coalesce(sum(quarter.kwh_ac), 0) AS kwh_ac
        FROM meter_quarters(meter, charger_performance.since, charger_performance.until) AS quarter
    ) AS own
    CROSS JOIN (
        SELECT
            coalesce(sum(run.minutes), 0)::bigint AS minutes,
            coalesce(sum(run.matched_ac), 0) AS ac,
            coalesce(sum(run.matched_dc), 0) AS dc,
            coalesce(array_agg(DISTINCT run.vehicle_id ORDER BY run.vehicle_id) FILTER (WHERE run.vehicle_id IS NOT NULL), '{}') AS vehicles
        FROM meter_runs(meter, charger_performance.since, charger_performance.until) AS run
    ) AS charged
    CROSS JOIN analytics_setting AS setting
    CROSS JOIN LATERAL efficiency_reason(
        own.readings, charged.vehicles <> '{}', charged.minutes, charged.ac, charged.dc, setting.efficiency_least_kwh
    ) AS why (reason);
END
$$;

COMMENT ON FUNCTION charger_performance(text, timestamptz, timestamptz) IS
    'How efficiently vehicles charged at a meter, of the readings with since <= ts < until (default: the last 24 hours, up to this moment). One row; columns as in charger_performance_24h.';

CREATE OR REPLACE FUNCTION loses(ac double precision, dc double precision, threshold double precision, least_kwh double precision) RETURNS boolean
LANGUAGE sql IMMUTABLE
AS $$
    SELECT CASE WHEN ac >= least_kwh AND dc <= ac THEN dc < threshold * ac END
$$;

COMMENT ON FUNCTION loses(double precision, double precision, double precision, double precision) IS
    'Whether matched energies of kWh AC and DC lose too much, given a threshold of the efficiency; NULL where they say nothing: below a least energy, or more DC than AC.';

CREATE OR REPLACE FUNCTION fleet_faults(since timestamptz, until timestamptz DEFAULT 'infinity')
RETURNS TABLE (
    meter_id             text,
    verdict              text,
    vehicle_id           text,
    kwh_ac               double precision,
    kwh_dc               double precision,
    efficiency           double precision,
    elsewhere_kwh_ac     double precision,
    elsewhere_efficiency double precision,
    meter_kwh_ac         double precision,
    meter_efficiency     double precision,
    meter_loss_kwh       double precision
)
LANGUAGE plpgsql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET jit = off
SET work_mem = '64MB'
AS $$
#variable_conflict use_column
DECLARE
    setting   analytics_setting := (SELECT analytics_setting FROM analytics_setting);
    threshold double precision  := setting.inefficient_below;
    least_kwh double precision  := greatest(setting.inefficient_least_kwh, setting.efficiency_least_kwh);
BEGIN
    RETURN QUERY
    WITH pair AS MATERIALIZED (
        SELECT part.meter_id, part.vehicle_id, part.matched_ac AS ac, part.matched_dc AS dc, loses(part.matched_ac, part.matched_dc, threshold, least_kwh) AS loses
        FROM fleet_charging(fleet_faults.since, fleet_faults.until, charged_only => true) AS part
    ),
    meter AS MATERIALIZED (
        SELECT pair.meter_id, sum(pair.ac) AS ac, sum(pair.dc) AS dc, count(*) FILTER (WHERE NOT pair.loses) AS fine
        FROM pair
        GROUP BY pair.meter_id
    ),
    suspect AS MATERIALIZED (
        SELECT meter.*
        FROM meter
        WHERE finding(meter.ac, meter.dc, threshold, least_kwh) = 'inefficient'
    ),
    -- What is known of each vehicle at a suspect, there and at all other meters.
    witness AS MATERIALIZED (
        SELECT
            here.meter_id,
            here.vehicle_id,
            here.ac,
            here.dc,
            here.loses,
            elsewhere.ac AS elsewhere_ac,
            elsewhere.dc AS elsewhere_dc,
            coalesce(elsewhere.fine OR NOT loses(elsewhere.ac, elsewhere.dc, threshold, least_kwh), false) AS fine_elsewhere,
            coalesce(elsewhere.lost OR loses(elsewhere.ac, elsewhere.dc, threshold, least_kwh), false) AS loses_elsewhere,
            coalesce(elsewhere.lost_alone, false) AS lost_alone
        FROM suspect
        JOIN pair AS here USING (meter_id)
        LEFT JOIN (
            SELECT
                one.meter_id,
                one.vehicle_id,
                sum(other.ac) AS ac,
                sum(other.dc) AS dc,
                bool_or(NOT other.loses) AS fine,
                bool_or(other.loses) AS lost,
                bool_or(other.loses AND meter.fine > 0) AS lost_alone
            FROM suspect
            JOIN pair AS one USING (meter_id)
            JOIN pair AS other ON other.vehicle_id = one.vehicle_id AND other.meter_id <> one.meter_id
            JOIN meter ON meter.meter_id = other.meter_id
            GROUP BY one.meter_id, one.vehicle_id
        ) AS elsewhere ON elsewhere.meter_id = here.meter_id AND elsewhere.vehicle_id = here.vehicle_id
    ),
    -- A vehicle that loses nothing anywhere clears its charger; one that is fine elsewhere accuses it.
    evidence AS (
        SELECT
            witness.meter_id,
            count(*) FILTER (WHERE NOT witness.loses) AS fine,
            count(*) FILTER (WHERE witness.loses AND witness.fine_elsewhere) AS accusing,
            count(*) FILTER (WHERE witness.loses AND NOT witness.fine_elsewhere AND witness.loses_elsewhere) AS losing,
            count(*) FILTER (WHERE witness.loses AND NOT witness.fine_elsewhere AND witness.lost_alone) AS faulty,
            count(*) FILTER (WHERE witness.loses AND NOT witness.fine_elsewhere AND NOT witness.loses_elsewhere) AS only_here
        FROM witness
        GROUP BY witness.meter_id
    )
    SELECT
        witness.meter_id,
        CASE
            WHEN evidence.fine = 0 AND (evidence.accusing > 0 OR evidence.only_here > 1) THEN 'charger'
            WHEN evidence.accusing > 1 AND evidence.accusing > evidence.fine THEN 'charger'
            WHEN evidence.accusing > 0 OR evidence.losing + evidence.only_here = 0 THEN 'cannot tell'
            WHEN evidence.fine > 0 AND evidence.fine + evidence.losing > 1 THEN 'vehicle'
            WHEN evidence.faulty > 0 AND evidence.only_here = 0 THEN 'vehicle'
            ELSE 'cannot tell'
        END,
        witness.vehicle_id,
        witness.ac,
        witness.dc,
        CASE WHEN witness.ac >= setting.efficiency_least_kwh AND witness.dc <= witness.ac THEN witness.dc / witness.ac END,
        coalesce(witness.elsewhere_ac, 0),
        CASE
            WHEN witness.elsewhere_ac >= setting.efficiency_least_kwh AND witness.elsewhere_dc <= witness.elsewhere_ac
            THEN witness.elsewhere_dc / witness.elsewhere_ac
        END,
        suspect.ac,
        suspect.dc / suspect.ac,
        suspect.ac - suspect.dc
    FROM witness
    JOIN evidence USING (meter_id)
    JOIN suspect USING (meter_id)
    ORDER BY suspect.ac - suspect.dc DESC, witness.meter_id, witness.vehicle_id;
END
$$;

COMMENT ON FUNCTION fleet_faults(timestamptz, timestamptz) IS
    'Which meters are inefficient (finding of fleet_chargers), of the readings with since <= ts < until, and whether charger or vehicle is at fault: a row for each '
    'vehicle that charged there, most loss first. A vehicle at a meter, or at all other meters together, loses where its matched AC energy is at least '
    'analytics_setting.inefficient_least_kwh and efficiency is below inefficient_below, is fine where it is not, and says nothing with less energy or more DC than AC. '
    'Elsewhere it is fine if it is fine at one other meter or at all others together, and else it loses if it loses at one or at all together. verdict, of the meter: '
    'charger: nobody is fine here, and one that loses here is fine elsewhere, or several lose here of which nothing is known elsewhere; or several that lose here are '
    'fine elsewhere, and more than are fine here. vehicle: none that loses here is fine elsewhere, and one of these: somebody is fine here and one that loses here '
    'loses elsewhere; several are fine here; all that lose here lose elsewhere, one of them at a meter where another is fine. cannot tell: all else. '
    'Columns: meter_id, verdict, vehicle_id, kwh_ac, kwh_dc (of the vehicle here, matched, in kWh), efficiency (of these; NULL below efficiency_least_kwh or with more '
    'DC than AC), elsewhere_kwh_ac, elsewhere_efficiency (the same of the vehicle at all other meters), meter_kwh_ac (matched, in kWh), meter_efficiency, '
    'meter_loss_kwh (AC - DC energy of the meter, in kWh).';
