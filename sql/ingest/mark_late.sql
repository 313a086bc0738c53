-- Marks the quarter hours whose rollups this batch has made untrue: those of late readings that it stored. (A duplicate has
-- another time of arrival in history.) Never ON CONFLICT: each transaction leaves marks of its own. LATERAL with OFFSET 0 as in
-- find_meter_conflicts.
INSERT INTO rollup_mark (device_id, kind, quarter_hours)
SELECT touched.device_id, touched.kind, tstzrange(touched.quarter_hour, touched.quarter_hour + '15 minutes')
FROM (
    SELECT staged.meter_id AS device_id, 'meter' AS kind, date_bin('15 minutes', staged.ts, 'epoch') AS quarter_hour
    FROM staged_meter AS staged
    CROSS JOIN LATERAL (
        SELECT
        FROM meter_history AS history
        WHERE history.meter_id = staged.meter_id AND history.ts = staged.ts AND history.received_at = staged.received_at
        OFFSET 0
    ) AS stored
    WHERE staged.ts < (SELECT late_before FROM rollup_progress)
    UNION
    SELECT device.device_id, device.kind, date_bin('15 minutes', staged.ts, 'epoch')
    FROM staged_vehicle AS staged
    CROSS JOIN LATERAL (
        SELECT reading.meter_id
        FROM vehicle_reading AS reading
        WHERE reading.vehicle_id = staged.vehicle_id AND reading.ts = staged.ts AND reading.received_at = staged.received_at
        OFFSET 0
    ) AS stored
    CROSS JOIN LATERAL (VALUES (staged.vehicle_id, 'vehicle'), (stored.meter_id, 'meter')) AS device (device_id, kind)
    WHERE staged.ts < (SELECT late_before FROM rollup_progress) AND device.device_id IS NOT NULL
) AS touched
