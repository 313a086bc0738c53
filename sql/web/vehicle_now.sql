-- The usual time between its newest readings is what makes a power of the energy of one.
SELECT
    status.vehicle_id,
    status.ts AS timestamp,
    status.online,
    status.charging,
    status.soc,
    status.kwh_dc,
    status.battery_temp,
    newest.meter_id,
    status.received_at,
    newest.usual_s,
    EXISTS (SELECT FROM device_silent AS silent WHERE silent.kind = 'vehicle' AND silent.device_id = %(device)s) AS silent
FROM vehicle_status AS status
CROSS JOIN LATERAL (
    SELECT
        (max(spaced.meter_id) FILTER (WHERE spaced.ts = status.ts)) AS meter_id,
        percentile_cont(0.5) WITHIN GROUP (ORDER BY spaced.space_s) AS usual_s
    FROM (
        SELECT reading.ts, reading.meter_id, extract(epoch FROM reading.ts - lag(reading.ts) OVER (ORDER BY reading.ts))::double precision AS space_s
        FROM (
            SELECT ts, meter_id
            FROM vehicle_reading
            WHERE vehicle_id = %(device)s AND ts <= status.ts AND ts > status.ts - interval '1 day'
            ORDER BY ts DESC
            LIMIT 10
        ) AS reading
    ) AS spaced
) AS newest
WHERE status.vehicle_id = %(device)s
