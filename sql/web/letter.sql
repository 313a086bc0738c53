-- With the beginning of the payload: that is all that is shown of it.
SELECT
    id, device_id, topic, content_type, reason, detail, received_at, payload_bytes,
    substring(payload FOR %(shown)s::integer) AS beginning
FROM dead_letter_list
WHERE id = %(id)s
LIMIT 1
