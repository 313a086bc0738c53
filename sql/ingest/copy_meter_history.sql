-- Readings that history certainly does not know.
COPY meter_history (meter_id, ts, kwh_ac, voltage, received_at, ts_from_arrival)
FROM STDIN (FORMAT BINARY)
