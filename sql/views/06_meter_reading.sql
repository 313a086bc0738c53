CREATE OR REPLACE VIEW meter_reading AS
SELECT meter_id, ts, kwh_ac, voltage, received_at, ts_from_arrival
FROM meter_history;

COMMENT ON VIEW meter_reading IS 'Every reading of every meter.';
COMMENT ON COLUMN meter_reading.meter_id IS 'The meter.';
COMMENT ON COLUMN meter_reading.ts IS 'End of the interval.';
COMMENT ON COLUMN meter_reading.kwh_ac IS 'Interval energy: AC energy consumed since the previous reading, in kWh.';
COMMENT ON COLUMN meter_reading.voltage IS 'Voltage at the end of the interval, in V.';
COMMENT ON COLUMN meter_reading.received_at IS 'When the bridge received the reading.';
COMMENT ON COLUMN meter_reading.ts_from_arrival IS 'True where the reading had no timestamp and ts is the time of arrival.';
