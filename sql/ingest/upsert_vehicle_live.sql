-- The newest staged reading of each vehicle becomes its live row, unless the live row is newer.
INSERT INTO vehicle_live AS live (vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, received_at)
SELECT DISTINCT ON (vehicle_id) vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, received_at
FROM staged_vehicle
ORDER BY vehicle_id, ts DESC
ON CONFLICT (vehicle_id) DO UPDATE
SET ts = excluded.ts, kwh_dc = excluded.kwh_dc, soc = excluded.soc, battery_temp = excluded.battery_temp,
    meter_id = excluded.meter_id, received_at = excluded.received_at
WHERE live.ts < excluded.ts
