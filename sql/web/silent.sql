-- The longest silence first; without its length, which grows all the time.
SELECT kind, device_id, ts AS timestamp, received_at, missed_readings, online
FROM device_silent
WHERE (%(kind)s::text IS NULL OR kind = %(kind)s)
    AND (
        %(after_received)s::timestamptz IS NULL
        OR (received_at, kind, device_id) > (%(after_received)s, %(after_kind)s, %(after_device)s)
    )
ORDER BY received_at, kind, device_id
LIMIT %(rows)s
