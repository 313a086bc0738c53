SELECT starts, kwh_ac, efficiency, reason
FROM vehicle_efficiency_by_hour(%(device)s, %(since)s, coalesce(%(until)s, 'infinity'::timestamptz))
ORDER BY starts
