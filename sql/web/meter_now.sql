-- The usual time between its newest readings is what makes a power of the energy of one.
SELECT
    status.meter_id,
    status.ts AS timestamp,
    status.online,
    status.charging,
    status.kwh_ac,
    status.voltage,
    status.received_at,
    newest.usual_s,
    EXISTS (SELECT FROM device_silent AS silent WHERE silent.kind = 'meter' AND silent.device_id = %(device)s) AS silent
FROM meter_status AS status
CROSS JOIN LATERAL (
    SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY spaced.space_s) AS usual_s
    FROM (
        SELECT extract(epoch FROM reading.ts - lag(reading.ts) OVER (ORDER BY reading.ts))::double precision AS space_s
        FROM (
            SELECT ts
            FROM meter_reading
            WHERE meter_id = %(device)s AND ts <= status.ts AND ts > status.ts - interval '1 day'
            ORDER BY ts DESC
            LIMIT 10
        ) AS reading
    ) AS spaced
) AS newest
WHERE status.meter_id = %(device)s
