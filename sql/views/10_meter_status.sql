CREATE OR REPLACE VIEW meter_status AS
SELECT
    live.meter_id,
    live.ts,
    now() - live.ts AS age,
    presence.online,
    live.kwh_ac > 0 AS charging,
    live.kwh_ac,
    live.voltage,
    live.received_at
FROM meter_live AS live
LEFT JOIN device_presence AS presence ON presence.device_id = live.meter_id AND presence.kind = 'meter';

COMMENT ON VIEW meter_status IS 'What each meter is doing now: one row a meter, from its newest reading and its status topic.';
COMMENT ON COLUMN meter_status.meter_id IS 'The meter.';
COMMENT ON COLUMN meter_status.ts IS 'End of the interval of the newest reading.';
COMMENT ON COLUMN meter_status.age IS 'Time since the newest reading.';
COMMENT ON COLUMN meter_status.online IS 'What its status topic last said; NULL where it never said anything.';
COMMENT ON COLUMN meter_status.charging IS 'True where the newest interval drew energy.';
COMMENT ON COLUMN meter_status.kwh_ac IS 'Interval energy of the newest reading, AC, in kWh.';
COMMENT ON COLUMN meter_status.voltage IS 'Voltage of the newest reading, in V.';
COMMENT ON COLUMN meter_status.received_at IS 'When the bridge received the newest reading.';
