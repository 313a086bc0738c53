CREATE OR REPLACE VIEW dead_letter_summary AS
SELECT DISTINCT ON (total.letters, total.reason)
    total.reason,
    total.letters,
    total.devices,
    total.first_received,
    total.last_received,
    newest.topic AS example_topic,
    newest.detail AS example_detail
FROM (
    SELECT
        reason,
        sum(letters)::bigint AS letters,
        count(*) FILTER (WHERE device_id <> '') AS devices,
        min(first_received) AS first_received,
        max(last_received) AS last_received
    FROM (
        SELECT reason, device_id, count(*) AS letters, min(received_at) AS first_received, max(received_at) AS last_received
        FROM dead_letter
        GROUP BY reason, device_id
    ) AS by_device
    GROUP BY reason
) AS total
JOIN dead_letter AS newest ON newest.reason = total.reason AND newest.received_at = total.last_received
ORDER BY total.letters DESC, total.reason, newest.topic, newest.digest;

COMMENT ON VIEW dead_letter_summary IS 'Dead letters by reason, the most frequent first; `wattbridge dead-letters` shows and replays them.';
COMMENT ON COLUMN dead_letter_summary.reason IS 'Stable reason code, see docs/architecture.md.';
COMMENT ON COLUMN dead_letter_summary.letters IS 'Dead letters with this reason; the same content on the same topic is kept and counted once.';
COMMENT ON COLUMN dead_letter_summary.devices IS 'Different device ids in their topics; letters whose topic names none that is valid do not count.';
COMMENT ON COLUMN dead_letter_summary.first_received IS 'When the bridge received the oldest of them.';
COMMENT ON COLUMN dead_letter_summary.last_received IS 'When the bridge received the newest of them.';
COMMENT ON COLUMN dead_letter_summary.example_topic IS 'The topic of the newest of them.';
COMMENT ON COLUMN dead_letter_summary.example_detail IS 'Its reason for a person to read.';
