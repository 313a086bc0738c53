-- The counters of this daemon since its first start.
SELECT received, stored, duplicate, dead_lettered, presence
FROM ingest_counter
WHERE instance = %(instance)s
