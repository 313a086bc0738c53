SELECT instance, received, stored, duplicate, dead_lettered, presence, updated_at
FROM ingest_status
ORDER BY instance
