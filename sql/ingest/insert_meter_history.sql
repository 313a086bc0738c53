-- Readings that are not in history yet. In key order, so that several writers never deadlock.
INSERT INTO meter_history (meter_id, ts, kwh_ac, voltage, received_at, ts_from_arrival)
SELECT meter_id, ts, kwh_ac, voltage, received_at, ts_from_arrival
FROM staged_meter
ORDER BY meter_id, ts
ON CONFLICT (meter_id, ts) DO NOTHING
