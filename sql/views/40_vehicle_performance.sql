CREATE OR REPLACE VIEW vehicle_performance_24h AS
SELECT performance.*, now() - interval '24 hours' AS since
FROM fleet_performance(now() - interval '24 hours') AS performance;

COMMENT ON VIEW vehicle_performance_24h IS
    'How efficiently each vehicle charged in the last 24 hours, up to this moment. For one vehicle vehicle_performance() is quicker; other windows: fleet_performance().';
COMMENT ON COLUMN vehicle_performance_24h.vehicle_id IS 'The vehicle.';
COMMENT ON COLUMN vehicle_performance_24h.readings IS 'Its readings in the window.';
COMMENT ON COLUMN vehicle_performance_24h.matched_minutes IS 'Minutes in which it alone reported from a meter, and the meter reported too.';
COMMENT ON COLUMN vehicle_performance_24h.kwh_ac IS 'AC energy of the matched minutes, by the meter, in kWh.';
COMMENT ON COLUMN vehicle_performance_24h.kwh_dc IS 'DC energy of the matched minutes, by the vehicle, in kWh.';
COMMENT ON COLUMN vehicle_performance_24h.efficiency IS 'kwh_dc / kwh_ac; NULL where it means nothing, see reason.';
COMMENT ON COLUMN vehicle_performance_24h.loss_kwh IS 'kwh_ac - kwh_dc; NULL with the efficiency.';
COMMENT ON COLUMN vehicle_performance_24h.reason IS
    'Why there is no efficiency: no readings, no meter known, no matched minute, too little energy (analytics_setting.efficiency_least_kwh), more DC than AC.';
COMMENT ON COLUMN vehicle_performance_24h.unattributed_kwh_dc IS 'DC energy outside of matched minutes, in kWh.';
COMMENT ON COLUMN vehicle_performance_24h.avg_soc IS 'Mean state of charge over its readings, in percent.';
COMMENT ON COLUMN vehicle_performance_24h.last_soc IS 'State of charge of its newest reading, in percent.';
COMMENT ON COLUMN vehicle_performance_24h.avg_battery_temp IS 'Mean battery temperature over its readings, in degrees Celsius.';
COMMENT ON COLUMN vehicle_performance_24h.max_battery_temp IS 'Highest battery temperature, in degrees Celsius.';
COMMENT ON COLUMN vehicle_performance_24h.meters IS 'The meters where it was plugged in.';
COMMENT ON COLUMN vehicle_performance_24h.since IS 'Start of the window. It has no end, as clocks may be a little ahead.';
