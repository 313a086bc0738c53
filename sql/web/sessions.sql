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
FROM charging_sessions(%(vehicle)s, %(since)s, coalesce(%(until)s, 'infinity'::timestamptz)) AS session
WHERE (%(meter)s::text IS NULL OR session.meter_id = %(meter)s)
    AND (%(after_started)s::timestamptz IS NULL OR (session.vehicle_id, session.started) > (%(after_vehicle)s, %(after_started)s))
ORDER BY session.vehicle_id, session.started
LIMIT %(rows)s
