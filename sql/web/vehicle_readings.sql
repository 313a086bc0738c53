SELECT ts AS timestamp, kwh_dc AS kwh, soc, battery_temp
FROM vehicle_reading
WHERE vehicle_id = %(device)s AND ts >= %(since)s AND ts < coalesce(%(until)s, 'infinity'::timestamptz)
ORDER BY ts
LIMIT %(rows)s
