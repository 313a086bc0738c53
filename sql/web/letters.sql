-- The newest first, as the view has it; without the payloads.
SELECT id, device_id, topic, reason, detail, payload_bytes, received_at
FROM dead_letter_list
WHERE (%(reason)s::text IS NULL OR reason = %(reason)s)
    AND (%(device)s::text IS NULL OR device_id = %(device)s)
    -- By the index; then exactly.
    AND received_at <= coalesce(%(after_received)s::timestamptz, 'infinity')
    AND (
        %(after_received)s::timestamptz IS NULL
        OR received_at < %(after_received)s
        OR id COLLATE "C" > %(after_id)s
    )
LIMIT %(rows)s
