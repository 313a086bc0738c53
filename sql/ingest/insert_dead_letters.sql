-- Dead letters that are not known yet, in key order; arrays, one element a dead letter.
INSERT INTO dead_letter (device_id, digest, topic, payload, content_type, reason, detail, received_at)
SELECT device_id, digest, topic, payload, content_type, reason, detail, received_at
FROM unnest(
    %(device_ids)s::text[], %(digests)s::bytea[], %(topics)s::text[], %(payloads)s::bytea[], %(content_types)s::text[],
    %(reasons)s::text[], %(details)s::text[], %(received_ats)s::timestamptz[]
) AS letter (device_id, digest, topic, payload, content_type, reason, detail, received_at)
ORDER BY device_id, digest
ON CONFLICT (device_id, digest) DO NOTHING
