-- The staging tables of one connection: a batch is copied here first, and gone at its commit.
CREATE TEMP TABLE IF NOT EXISTS staged_meter (
    meter_id        text,
    ts              timestamptz,
    kwh_ac          double precision,
    voltage         double precision,
    received_at     timestamptz,
    ts_from_arrival boolean
) ON COMMIT DELETE ROWS;
CREATE TEMP TABLE IF NOT EXISTS staged_vehicle (
    vehicle_id      text,
    ts              timestamptz,
    kwh_dc          double precision,
    soc             double precision,
    battery_temp    double precision,
    meter_id        text,
    received_at     timestamptz,
    ts_from_arrival boolean
) ON COMMIT DELETE ROWS
