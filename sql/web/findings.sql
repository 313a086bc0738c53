-- Of the whole fleet: few of it.
SELECT meter_id, finding FROM fleet_chargers(%(since)s, %(until)s) WHERE finding IS NOT NULL ORDER BY meter_id
