-- Staged readings that history knows with other values, and those values. LATERAL with OFFSET 0 keeps this one index lookup a reading:
-- the staging table has no statistics, and a hash join would read whole partitions.
SELECT staged.vehicle_id, staged.ts, known.kwh_dc, known.soc, known.battery_temp, known.meter_id
FROM staged_vehicle AS staged
CROSS JOIN LATERAL (
    SELECT history.kwh_dc, history.soc, history.battery_temp, history.meter_id
    FROM vehicle_history AS history
    WHERE history.vehicle_id = staged.vehicle_id AND history.ts = staged.ts
    OFFSET 0
) AS known
WHERE (known.kwh_dc, known.soc, known.battery_temp, known.meter_id)
    IS DISTINCT FROM (staged.kwh_dc, staged.soc, staged.battery_temp, staged.meter_id)
