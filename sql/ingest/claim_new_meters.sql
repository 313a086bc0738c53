-- The meters of the batch that have no live row get one. Before the others are claimed: those who write a new meter at once wait here, in the
-- order of the key, for one another alone.
INSERT INTO meter_live (meter_id, ts, kwh_ac, voltage, received_at)
SELECT claimed.meter_id, claimed.ts, claimed.kwh_ac, claimed.voltage, claimed.received_at
FROM claimed_meter AS claimed
WHERE NOT EXISTS (SELECT FROM meter_live AS live WHERE live.meter_id = claimed.meter_id OFFSET 0)
ORDER BY claimed.meter_id
ON CONFLICT (meter_id) DO NOTHING
