-- Of a vehicle or of a charger, the newest first; and how many there are in all.
SELECT
    session.vehicle_id,
    session.meter_id,
    session.started,
    session.ended,
    session.kwh_ac,
    session.kwh_dc,
    session.efficiency,
    session.reason,
    session.mean_kw,
    session.peak_kw,
    session.soc_from,
    session.soc_to,
    count(*) OVER () AS sessions
FROM (
    SELECT own.*
    FROM charging_sessions(%(vehicle)s, %(since)s, coalesce(%(until)s, 'infinity'::timestamptz)) AS own
    WHERE %(vehicle)s::text IS NOT NULL
    UNION ALL
    SELECT there.*
    FROM charger_sessions(%(meter)s, %(since)s, coalesce(%(until)s, 'infinity'::timestamptz)) AS there
    WHERE %(meter)s::text IS NOT NULL
) AS session
ORDER BY session.started DESC, session.vehicle_id
LIMIT %(rows)s
