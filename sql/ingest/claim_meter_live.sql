-- The oldest reading that a batch has of each meter becomes the live row of the meter, unless the live row is as new. Where it does, history
-- knows none of the batch's readings of this meter, as the live row is the newest reading of history. Each live row is written, also one
-- that stays as it is: so all are ours until the commit. In the order of claimed_meter, which is that of the key, so that several writers
-- never deadlock (see BY_KEY in bridge/store.py). Returns how many have a live row, and which meters one that is as new.
WITH touched AS (
    UPDATE meter_live AS live
    SET ts = greatest(live.ts, claimed.ts),
        kwh_ac = CASE WHEN live.ts < claimed.ts THEN claimed.kwh_ac ELSE live.kwh_ac END,
        voltage = CASE WHEN live.ts < claimed.ts THEN claimed.voltage ELSE live.voltage END,
        received_at = CASE WHEN live.ts < claimed.ts THEN claimed.received_at ELSE live.received_at END
    FROM claimed_meter AS claimed
    WHERE live.meter_id = claimed.meter_id
    RETURNING live.meter_id, live.ts = claimed.ts AND live.received_at = claimed.received_at AS is_claimed
)
SELECT count(*), array_agg(meter_id) FILTER (WHERE NOT is_claimed)
FROM touched
