-- Adds one batch to the counters of this daemon. A batch whose commit was not answered comes again with the same id:
-- then it changed nothing above, and is not counted a second time here. Returns the counters, or nothing where they stay.
INSERT INTO ingest_counter AS total (instance, received, stored, duplicate, dead_lettered, presence, last_batch, updated_at)
VALUES (%(instance)s, %(received)s, %(stored)s, %(duplicate)s, %(dead_lettered)s, %(presence)s, %(batch)s, clock_timestamp())
ON CONFLICT (instance) DO UPDATE
SET received = total.received + excluded.received,
    stored = total.stored + excluded.stored,
    duplicate = total.duplicate + excluded.duplicate,
    dead_lettered = total.dead_lettered + excluded.dead_lettered,
    presence = total.presence + excluded.presence,
    last_batch = excluded.last_batch,
    updated_at = excluded.updated_at
WHERE total.last_batch <> excluded.last_batch
RETURNING received, stored, duplicate, dead_lettered, presence
