-- The newest staged reading of each vehicle becomes its live row, unless the live row is as new: those are not even locked.
INSERT INTO vehicle_live AS live (vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, received_at)
SELECT DISTINCT ON (staged.vehicle_id)
    staged.vehicle_id, staged.ts, staged.kwh_dc, staged.soc, staged.battery_temp, staged.meter_id, staged.received_at
FROM staged_vehicle AS staged
WHERE NOT EXISTS (
    SELECT FROM vehicle_live AS known WHERE known.vehicle_id = staged.vehicle_id AND known.ts >= staged.ts OFFSET 0
)
ORDER BY staged.vehicle_id, staged.ts DESC
ON CONFLICT (vehicle_id) DO UPDATE
SET ts = excluded.ts, kwh_dc = excluded.kwh_dc, soc = excluded.soc, battery_temp = excluded.battery_temp,
    meter_id = excluded.meter_id, received_at = excluded.received_at
WHERE live.ts < excluded.ts
