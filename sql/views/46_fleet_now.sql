-- Of live rows alone: one reading of each device.
CREATE OR REPLACE VIEW fleet_now AS
SELECT
    meter.devices AS meters,
    vehicle.devices AS vehicles,
    meter.silent AS meters_silent,
    vehicle.silent AS vehicles_silent,
    meter.drawing AS meters_drawing,
    vehicle.charging AS vehicles_charging,
    meter.kwh * 3600 / setting.interval_s AS kw_ac,
    vehicle.kwh * 3600 / setting.interval_s AS kw_dc,
    greatest(meter.newest, vehicle.newest) AS newest_received_at,
    delay.seconds[1] AS median_delay_s,
    delay.seconds[2] AS p95_delay_s
FROM (
    SELECT
        now() - silent_after * reading_interval AS silent_since,
        extract(epoch FROM reading_interval)::double precision AS interval_s
    FROM analytics_setting
) AS setting
CROSS JOIN LATERAL (
    SELECT
        count(*) AS devices,
        count(*) FILTER (WHERE live.received_at <= setting.silent_since) AS silent,
        count(*) FILTER (WHERE live.received_at > setting.silent_since AND live.kwh_ac > 0) AS drawing,
        coalesce(sum(live.kwh_ac) FILTER (WHERE live.received_at > setting.silent_since), 0) AS kwh,
        max(live.received_at) AS newest
    FROM meter_live AS live
) AS meter
CROSS JOIN LATERAL (
    SELECT
        count(*) AS devices,
        count(*) FILTER (WHERE live.received_at <= setting.silent_since) AS silent,
        count(*) FILTER (WHERE live.received_at > setting.silent_since AND live.kwh_dc > 0) AS charging,
        coalesce(sum(live.kwh_dc) FILTER (WHERE live.received_at > setting.silent_since), 0) AS kwh,
        max(live.received_at) AS newest
    FROM vehicle_live AS live
) AS vehicle
CROSS JOIN (
    -- Not EXTRACT: that is numeric, and takes twice as long over a large fleet.
    SELECT percentile_cont(ARRAY[0.5, 0.95]) WITHIN GROUP (ORDER BY date_part('epoch', came.received_at - came.ts)) AS seconds
    FROM (
        SELECT ts, received_at FROM meter_live
        UNION ALL
        SELECT ts, received_at FROM vehicle_live
    ) AS came
    -- Equal where the reading had no timestamp of its own: that is no delay.
    WHERE came.received_at > now() - interval '2 minutes' AND came.received_at <> came.ts
) AS delay;

COMMENT ON VIEW fleet_now IS 'What the whole fleet is doing now, one row, from the newest reading of each device. Silent ones (see device_silent) draw nothing.';
COMMENT ON COLUMN fleet_now.meters IS 'Meters that ever sent a reading.';
COMMENT ON COLUMN fleet_now.vehicles IS 'Vehicles that ever sent a reading.';
COMMENT ON COLUMN fleet_now.meters_silent IS 'Meters in device_silent.';
COMMENT ON COLUMN fleet_now.vehicles_silent IS 'Vehicles in device_silent.';
COMMENT ON COLUMN fleet_now.meters_drawing IS 'Meters that are not silent and whose newest interval drew energy.';
COMMENT ON COLUMN fleet_now.vehicles_charging IS 'Vehicles that are not silent and whose newest interval delivered energy to the battery.';
COMMENT ON COLUMN fleet_now.kw_ac IS
    'Power of all meters that are not silent, in kW AC: their newest interval energy over analytics_setting.reading_interval.';
COMMENT ON COLUMN fleet_now.kw_dc IS 'Power into the batteries of all vehicles that are not silent, in kW DC, likewise.';
COMMENT ON COLUMN fleet_now.newest_received_at IS 'When the bridge received the newest of all these readings; NULL where there is none.';
COMMENT ON COLUMN fleet_now.median_delay_s IS
    'From timestamp to arrival, in seconds: the median over newest readings that came in the last 2 minutes and had a timestamp of their own; NULL without any.';
COMMENT ON COLUMN fleet_now.p95_delay_s IS 'Of the same readings the delay, in seconds, that 95 of 100 do not exceed.';
