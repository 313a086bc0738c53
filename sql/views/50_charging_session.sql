CREATE OR REPLACE VIEW charging_session AS
SELECT
    -- Not the session's own: a condition on it must choose the vehicle before its sessions are computed.
    vehicle.vehicle_id,
    session.meter_id,
    session.started,
    session.ended,
    session.readings,
    session.matched_minutes,
    session.kwh_ac,
    session.kwh_dc,
    session.efficiency,
    session.reason,
    session.mean_kw,
    session.peak_kw,
    session.soc_from,
    session.soc_to
FROM vehicle_live AS vehicle
CROSS JOIN LATERAL charging_sessions(vehicle.vehicle_id) AS session;

COMMENT ON VIEW charging_session IS
    'Every charging session; quick with WHERE vehicle_id = ..., all vehicles at once are quicker by charging_sessions(NULL, since, until).';
COMMENT ON COLUMN charging_session.vehicle_id IS 'The vehicle.';
COMMENT ON COLUMN charging_session.meter_id IS 'The meter where it was plugged in.';
COMMENT ON COLUMN charging_session.started IS 'Its first reading there.';
COMMENT ON COLUMN charging_session.ended IS 'Its last reading there; it may be still there.';
COMMENT ON COLUMN charging_session.readings IS 'Its readings there.';
COMMENT ON COLUMN charging_session.matched_minutes IS 'Minutes in which it alone reported from the meter, and the meter reported too.';
COMMENT ON COLUMN charging_session.kwh_ac IS 'AC energy of the matched minutes, by the meter, in kWh.';
COMMENT ON COLUMN charging_session.kwh_dc IS 'DC energy of all its readings there, in kWh.';
COMMENT ON COLUMN charging_session.efficiency IS 'DC over AC energy of the matched minutes; NULL where it means nothing, see reason.';
COMMENT ON COLUMN charging_session.reason IS 'Why there is no efficiency: no matched minute, too little energy, more DC than AC.';
COMMENT ON COLUMN charging_session.mean_kw IS 'Mean power into the battery while plugged in, in kW DC.';
COMMENT ON COLUMN charging_session.peak_kw IS 'Power into the battery in the best minute (or reading interval, if that is longer), in kW DC.';
COMMENT ON COLUMN charging_session.soc_from IS 'State of charge of the first reading, in percent.';
COMMENT ON COLUMN charging_session.soc_to IS 'State of charge of the last reading, in percent.';
