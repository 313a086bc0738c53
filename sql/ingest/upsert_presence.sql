-- What devices said on their status topics; arrays, one element a device. The broker keeps their order, so the last one holds, also
-- where our clock was put back in between. Only what comes out of the dead letters may be older than what is known.
INSERT INTO device_presence AS known (device_id, kind, online, received_at)
SELECT device_id, kind, online, received_at
FROM unnest(
    %(device_ids)s::text[], %(kinds)s::text[], %(onlines)s::boolean[], %(received_ats)s::timestamptz[]
) AS said (device_id, kind, online, received_at)
ORDER BY device_id, kind
ON CONFLICT (device_id, kind) DO UPDATE
SET online = excluded.online, received_at = excluded.received_at
WHERE NOT %(replayed)s OR known.received_at <= excluded.received_at
