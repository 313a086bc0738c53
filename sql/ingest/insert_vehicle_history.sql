-- Readings that are not in history yet. In key order, so that several writers never deadlock.
INSERT INTO vehicle_history (vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, received_at, ts_from_arrival)
SELECT vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, received_at, ts_from_arrival
FROM staged_vehicle
ORDER BY vehicle_id, ts
ON CONFLICT (vehicle_id, ts) DO NOTHING
