-- Only the one that suits is computed: of a meter without a vehicle, the vehicles that were there are enough.
SELECT
    session.vehicle_id,
    session.meter_id,
    session.started,
    session.ended,
    session.kwh_ac AS ac_consumed_kwh,
    session.kwh_dc AS dc_delivered_kwh,
    session.efficiency AS charging_efficiency,
    session.reason,
    session.mean_kw,
    session.peak_kw,
    session.soc_from,
    session.soc_to,
    session.matched_minutes,
    session.readings
FROM (
    SELECT one.*
    FROM charging_sessions(%(vehicle)s, %(since)s, coalesce(%(until)s, 'infinity'::timestamptz)) AS one
    WHERE (%(vehicle)s::text IS NOT NULL OR %(meter)s::text IS NULL) AND (%(meter)s::text IS NULL OR one.meter_id = %(meter)s)
    UNION ALL
    SELECT there.*
    FROM charger_sessions(%(meter)s, %(since)s, coalesce(%(until)s, 'infinity'::timestamptz)) AS there
    WHERE %(vehicle)s::text IS NULL AND %(meter)s::text IS NOT NULL
) AS session
WHERE %(after_started)s::timestamptz IS NULL OR (session.vehicle_id, session.started) > (%(after_vehicle)s, %(after_started)s)
ORDER BY session.vehicle_id, session.started
LIMIT %(rows)s
