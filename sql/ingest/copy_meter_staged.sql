-- Readings that history may know.
COPY staged_meter (meter_id, ts, kwh_ac, voltage, received_at, ts_from_arrival)
FROM STDIN (FORMAT BINARY)
