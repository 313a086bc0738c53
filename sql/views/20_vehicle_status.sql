CREATE OR REPLACE VIEW vehicle_status AS
SELECT
    live.vehicle_id,
    live.ts,
    now() - live.ts AS age,
    presence.online,
    live.kwh_dc > 0 AS charging,
    live.soc,
    live.kwh_dc,
    live.battery_temp,
    live.meter_id,
    live.received_at
FROM vehicle_live AS live
LEFT JOIN device_presence AS presence ON presence.device_id = live.vehicle_id AND presence.kind = 'vehicle';

COMMENT ON VIEW vehicle_status IS 'What each vehicle is doing now: one row a vehicle, from its newest reading and its status topic.';
COMMENT ON COLUMN vehicle_status.vehicle_id IS 'The vehicle.';
COMMENT ON COLUMN vehicle_status.ts IS 'End of the interval of the newest reading.';
COMMENT ON COLUMN vehicle_status.age IS 'Time since the newest reading.';
COMMENT ON COLUMN vehicle_status.online IS 'What its status topic last said; NULL where it never said anything.';
COMMENT ON COLUMN vehicle_status.charging IS 'True where the newest interval delivered energy to the battery.';
COMMENT ON COLUMN vehicle_status.soc IS 'State of charge, in percent.';
COMMENT ON COLUMN vehicle_status.kwh_dc IS 'Interval energy of the newest reading, DC, in kWh.';
COMMENT ON COLUMN vehicle_status.battery_temp IS 'Battery temperature, in degrees Celsius.';
COMMENT ON COLUMN vehicle_status.meter_id IS 'The meter of the charger it is plugged into; NULL where the reading names none.';
COMMENT ON COLUMN vehicle_status.received_at IS 'When the bridge received the newest reading.';
