-- Staged readings that history knows with other values, and those values. LATERAL with OFFSET 0 keeps this one index lookup a reading:
-- the staging table has no statistics, and a hash join would read whole partitions.
SELECT staged.meter_id, staged.ts, known.kwh_ac, known.voltage
FROM staged_meter AS staged
CROSS JOIN LATERAL (
    SELECT history.kwh_ac, history.voltage
    FROM meter_history AS history
    WHERE history.meter_id = staged.meter_id AND history.ts = staged.ts
    OFFSET 0
) AS known
WHERE (known.kwh_ac, known.voltage) IS DISTINCT FROM (staged.kwh_ac, staged.voltage)
