-- The staging tables of one connection; what is copied there is gone at the commit. Claimed are the oldest readings of each device,
-- to become its live row; staged is what history may know. (Text of limited length: so the tables need no TOAST to be emptied.)
CREATE TEMP TABLE IF NOT EXISTS staged_meter (
    meter_id        varchar(128),
    ts              timestamptz,
    kwh_ac          double precision,
    voltage         double precision,
    received_at     timestamptz,
    ts_from_arrival boolean
) ON COMMIT DELETE ROWS;
CREATE TEMP TABLE IF NOT EXISTS staged_vehicle (
    vehicle_id      varchar(128),
    ts              timestamptz,
    kwh_dc          double precision,
    soc             double precision,
    battery_temp    double precision,
    meter_id        varchar(128),
    received_at     timestamptz,
    ts_from_arrival boolean
) ON COMMIT DELETE ROWS;
CREATE TEMP TABLE IF NOT EXISTS claimed_meter (LIKE staged_meter) ON COMMIT DELETE ROWS;
CREATE TEMP TABLE IF NOT EXISTS claimed_vehicle (LIKE staged_vehicle) ON COMMIT DELETE ROWS
