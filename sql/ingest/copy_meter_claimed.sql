-- The oldest reading of each meter in a batch.
COPY claimed_meter (meter_id, ts, kwh_ac, voltage, received_at, ts_from_arrival)
FROM STDIN (FORMAT BINARY)
