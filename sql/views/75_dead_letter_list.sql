CREATE OR REPLACE VIEW dead_letter_list AS
SELECT
    encode(digest, 'hex') AS id,
    device_id,
    topic,
    content_type,
    payload,
    octet_length(payload) AS payload_bytes,
    reason,
    detail,
    received_at
FROM dead_letter
ORDER BY received_at DESC, dead_letter.digest;

COMMENT ON VIEW dead_letter_list IS
    'Every dead letter, the newest first: ask with LIMIT. What devices sent is hostile: payload, topic and content_type may hold markup, control '
    'characters, formulas or secrets of whoever sent them. Show them as text or hex, never as anything else.';
COMMENT ON COLUMN dead_letter_list.id IS 'Identity of the dead letter: SHA-256 over topic, content type and payload, whole, in hex; `wattbridge dead-letters` shows its beginning.';
COMMENT ON COLUMN dead_letter_list.device_id IS 'The device named in the topic; empty where the topic names none that is valid.';
COMMENT ON COLUMN dead_letter_list.topic IS 'The topic it was published to.';
COMMENT ON COLUMN dead_letter_list.content_type IS 'The MQTT 5 content type, where the publisher gave one.';
COMMENT ON COLUMN dead_letter_list.payload IS 'The payload, byte by byte: hostile. For one element of an array, or a conflict, that reading alone.';
COMMENT ON COLUMN dead_letter_list.payload_bytes IS 'Length of the payload in bytes; asked without the payload it is not read.';
COMMENT ON COLUMN dead_letter_list.reason IS 'Stable reason code, see docs/architecture.md.';
COMMENT ON COLUMN dead_letter_list.detail IS 'The reason for a person to read.';
COMMENT ON COLUMN dead_letter_list.received_at IS 'When the bridge first received it.';
