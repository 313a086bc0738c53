-- What the counters say, over all daemons, and what is really there.
SELECT
    coalesce(sum(stored), 0)::bigint AS stored,
    coalesce(sum(duplicate), 0)::bigint AS duplicate,
    coalesce(sum(dead_lettered), 0)::bigint AS dead_lettered,
    (SELECT count(*) FROM meter_history) AS meter_rows,
    (SELECT count(*) FROM vehicle_history) AS vehicle_rows,
    (SELECT count(*) FROM dead_letter) AS letters
FROM ingest_counter
