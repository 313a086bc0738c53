-- What devices said on their status topics; arrays, one element a device. A status that arrived earlier changes nothing.
INSERT INTO device_presence AS known (device_id, kind, online, received_at)
SELECT device_id, kind, online, received_at
FROM unnest(
    %(device_ids)s::text[], %(kinds)s::text[], %(onlines)s::boolean[], %(received_ats)s::timestamptz[]
) AS said (device_id, kind, online, received_at)
ORDER BY device_id, kind
ON CONFLICT (device_id, kind) DO UPDATE
SET online = excluded.online, received_at = excluded.received_at
WHERE known.received_at <= excluded.received_at
