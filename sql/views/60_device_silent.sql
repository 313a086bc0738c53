-- By arrival: a timestamp is the device's own, and its clock may be wrong.
CREATE OR REPLACE VIEW device_silent AS
SELECT
    device.kind,
    device.device_id,
    device.ts,
    device.received_at,
    now() - device.received_at AS silence,
    floor(extract(epoch FROM now() - device.received_at) / extract(epoch FROM setting.reading_interval))::bigint AS missed_readings,
    presence.online
FROM (
    SELECT 'meter' AS kind, meter_id AS device_id, ts, received_at FROM meter_live
    UNION ALL
    SELECT 'vehicle', vehicle_id, ts, received_at FROM vehicle_live
) AS device
JOIN analytics_setting AS setting ON device.received_at <= now() - setting.silent_after * setting.reading_interval
LEFT JOIN device_presence AS presence USING (device_id, kind)
ORDER BY silence DESC, kind, device_id;

COMMENT ON VIEW device_silent IS
    'Devices from which nothing new came for analytics_setting.silent_after reading intervals, the longest silence first. '
    'Readings that are older than the newest one (a backfill, a clock set back) do not end a silence.';
COMMENT ON COLUMN device_silent.kind IS 'meter or vehicle.';
COMMENT ON COLUMN device_silent.device_id IS 'The meter or vehicle.';
COMMENT ON COLUMN device_silent.ts IS 'End of the interval of the newest reading, by the clock of the device.';
COMMENT ON COLUMN device_silent.received_at IS 'When the bridge received the newest reading.';
COMMENT ON COLUMN device_silent.silence IS 'Time since then.';
COMMENT ON COLUMN device_silent.missed_readings IS 'How many reading intervals (analytics_setting.reading_interval) have passed since then.';
COMMENT ON COLUMN device_silent.online IS
    'What its status topic last said; NULL where it never said anything. True: connected, and yet it sends no readings.';
