-- The vehicles of the batch that have no live row get one. Before the others are claimed: those who write a new vehicle at once wait here, in the
-- order of the key, for one another alone.
INSERT INTO vehicle_live (vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, received_at)
SELECT claimed.vehicle_id, claimed.ts, claimed.kwh_dc, claimed.soc, claimed.battery_temp, claimed.meter_id, claimed.received_at
FROM claimed_vehicle AS claimed
WHERE NOT EXISTS (SELECT FROM vehicle_live AS live WHERE live.vehicle_id = claimed.vehicle_id OFFSET 0)
ORDER BY claimed.vehicle_id
ON CONFLICT (vehicle_id) DO NOTHING
