SELECT vehicle_id, matched_minutes, kwh_ac, kwh_dc, efficiency, reason, loss_kwh, first_seen, last_seen
FROM charger_vehicles(%(device)s, %(since)s, coalesce(%(until)s, 'infinity'::timestamptz))
ORDER BY loss_kwh DESC NULLS LAST, vehicle_id
