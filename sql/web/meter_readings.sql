SELECT ts AS timestamp, kwh_ac AS kwh, voltage
FROM meter_reading
WHERE meter_id = %(device)s AND ts >= %(since)s AND ts < coalesce(%(until)s, 'infinity'::timestamptz)
ORDER BY ts
LIMIT %(rows)s
