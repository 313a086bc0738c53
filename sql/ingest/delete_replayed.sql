-- Dead letters whose replay is part of this batch.
DELETE FROM dead_letter
USING unnest(%(device_ids)s::text[], %(digests)s::bytea[]) AS replayed (device_id, digest)
WHERE dead_letter.device_id = replayed.device_id AND dead_letter.digest = replayed.digest
