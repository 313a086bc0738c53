-- Adds the duplicates of this batch to those of their devices: what history knew before, with the same values, and what the
-- batch knows by itself (arrays, one element a device). Where history knew none it is not asked. In key order, so that several writers never deadlock.
INSERT INTO device_duplicate AS total (device_id, kind, duplicates)
SELECT again.device_id, again.kind, sum(again.duplicates)::bigint
FROM (
    SELECT staged.meter_id AS device_id, 'meter' AS kind, count(*) AS duplicates
    FROM staged_meter AS staged
    CROSS JOIN LATERAL (
        SELECT
        FROM meter_history AS history
        WHERE history.meter_id = staged.meter_id AND history.ts = staged.ts AND history.received_at <> staged.received_at
            AND (history.kwh_ac, history.voltage) IS NOT DISTINCT FROM (staged.kwh_ac, staged.voltage)
        OFFSET 0
    ) AS known
    WHERE %(known)s::boolean
    GROUP BY staged.meter_id
    UNION ALL
    SELECT staged.vehicle_id, 'vehicle', count(*)
    FROM staged_vehicle AS staged
    CROSS JOIN LATERAL (
        SELECT
        FROM vehicle_history AS history
        WHERE history.vehicle_id = staged.vehicle_id AND history.ts = staged.ts AND history.received_at <> staged.received_at
            AND (history.kwh_dc, history.soc, history.battery_temp, history.meter_id)
                IS NOT DISTINCT FROM (staged.kwh_dc, staged.soc, staged.battery_temp, staged.meter_id)
        OFFSET 0
    ) AS known
    WHERE %(known)s::boolean
    GROUP BY staged.vehicle_id
    UNION ALL
    SELECT device_id, kind, duplicates
    FROM unnest(%(device_ids)s::text[], %(kinds)s::text[], %(duplicates)s::bigint[]) AS counted (device_id, kind, duplicates)
) AS again
GROUP BY again.device_id, again.kind
ORDER BY again.device_id, again.kind
ON CONFLICT (device_id, kind) DO UPDATE
SET duplicates = total.duplicates + excluded.duplicates
