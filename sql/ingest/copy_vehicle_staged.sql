-- Readings that history may know.
COPY staged_vehicle (vehicle_id, ts, kwh_dc, soc, battery_temp, meter_id, received_at, ts_from_arrival)
FROM STDIN (FORMAT BINARY)
