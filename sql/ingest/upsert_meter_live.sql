-- The newest staged reading of each meter becomes its live row, unless the live row is as new: those are not even locked.
INSERT INTO meter_live AS live (meter_id, ts, kwh_ac, voltage, received_at)
SELECT DISTINCT ON (staged.meter_id) staged.meter_id, staged.ts, staged.kwh_ac, staged.voltage, staged.received_at
FROM staged_meter AS staged
WHERE NOT EXISTS (
    SELECT FROM meter_live AS known WHERE known.meter_id = staged.meter_id AND known.ts >= staged.ts OFFSET 0
)
ORDER BY staged.meter_id, staged.ts DESC
ON CONFLICT (meter_id) DO UPDATE
SET ts = excluded.ts, kwh_ac = excluded.kwh_ac, voltage = excluded.voltage, received_at = excluded.received_at
WHERE live.ts < excluded.ts
