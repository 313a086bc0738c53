-- The oldest reading that a batch has of each vehicle becomes the live row of the vehicle, unless the live row is as new. Where it does, history
-- knows none of the batch's readings of this vehicle, as the live row is the newest reading of history. Each live row is written, also one
-- that stays as it is: so all are ours until the commit. In the order of claimed_vehicle, which is that of the key, so that several writers
-- never deadlock (see BY_KEY in bridge/store.py). Returns how many have a live row, and which vehicles one that is as new.
WITH touched AS (
    UPDATE vehicle_live AS live
    SET ts = greatest(live.ts, claimed.ts),
        kwh_dc = CASE WHEN live.ts < claimed.ts THEN claimed.kwh_dc ELSE live.kwh_dc END,
        soc = CASE WHEN live.ts < claimed.ts THEN claimed.soc ELSE live.soc END,
        battery_temp = CASE WHEN live.ts < claimed.ts THEN claimed.battery_temp ELSE live.battery_temp END,
        meter_id = CASE WHEN live.ts < claimed.ts THEN claimed.meter_id ELSE live.meter_id END,
        received_at = CASE WHEN live.ts < claimed.ts THEN claimed.received_at ELSE live.received_at END
    FROM claimed_vehicle AS claimed
    WHERE live.vehicle_id = claimed.vehicle_id
    RETURNING live.vehicle_id, live.ts = claimed.ts AND live.received_at = claimed.received_at AS is_claimed
)
SELECT count(*), array_agg(vehicle_id) FILTER (WHERE NOT is_claimed)
FROM touched
