-- Readings that history certainly does not know.
COPY vehicle_history (vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, received_at, ts_from_arrival)
FROM STDIN (FORMAT BINARY)
