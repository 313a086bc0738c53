-- The newest staged reading of each meter becomes its live row, unless the live row is newer.
INSERT INTO meter_live AS live (meter_id, ts, kwh_ac, voltage, received_at)
SELECT DISTINCT ON (meter_id) meter_id, ts, kwh_ac, voltage, received_at
FROM staged_meter
ORDER BY meter_id, ts DESC
ON CONFLICT (meter_id) DO UPDATE
SET ts = excluded.ts, kwh_ac = excluded.kwh_ac, voltage = excluded.voltage, received_at = excluded.received_at
WHERE live.ts < excluded.ts
