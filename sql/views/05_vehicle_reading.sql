-- Where a vehicle was plugged in, in order of trust: what the reading says, the assignment of that time, the naming rule.
CREATE OR REPLACE VIEW vehicle_reading AS
SELECT
    history.vehicle_id,
    history.ts,
    history.kwh_dc,
    history.soc,
    history.battery_temp,
    coalesce(
        history.meter_id,
        assignment.meter_id,
        CASE
            WHEN starts_with(history.vehicle_id, setting.vehicle_prefix)
            THEN setting.meter_prefix || substr(history.vehicle_id, length(setting.vehicle_prefix) + 1)
        END
    ) AS meter_id,
    history.received_at,
    history.ts_from_arrival
FROM vehicle_history AS history
LEFT JOIN charger_assignment AS assignment
    ON history.meter_id IS NULL AND assignment.vehicle_id = history.vehicle_id AND assignment.valid @> history.ts
CROSS JOIN analytics_setting AS setting;

COMMENT ON VIEW vehicle_reading IS 'Every reading of every vehicle, with the meter it was plugged into as far as anything tells.';
COMMENT ON COLUMN vehicle_reading.vehicle_id IS 'The vehicle.';
COMMENT ON COLUMN vehicle_reading.ts IS 'End of the interval.';
COMMENT ON COLUMN vehicle_reading.kwh_dc IS 'Interval energy: DC energy that reached the battery since the previous reading, in kWh.';
COMMENT ON COLUMN vehicle_reading.soc IS 'State of charge, in percent.';
COMMENT ON COLUMN vehicle_reading.battery_temp IS 'Battery temperature, in degrees Celsius.';
COMMENT ON COLUMN vehicle_reading.meter_id IS 'The plugged meter: named by the reading, else assigned at that time, else by the naming rule, else NULL.';
COMMENT ON COLUMN vehicle_reading.received_at IS 'When the bridge received the reading.';
COMMENT ON COLUMN vehicle_reading.ts_from_arrival IS 'True where the reading had no timestamp and ts is the time of arrival.';
