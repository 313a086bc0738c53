-- With the time that they stand for: rates are differences.
SELECT instance, received, stored, duplicate, dead_lettered, presence, updated_at, statement_timestamp() AS asked_at
FROM ingest_status
ORDER BY instance
