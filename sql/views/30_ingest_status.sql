CREATE OR REPLACE VIEW ingest_status AS
SELECT instance, received, stored, duplicate, dead_lettered, presence, updated_at
FROM ingest_counter;

COMMENT ON VIEW ingest_status IS 'What became of every reading, by daemon: received = stored + duplicate + dead_lettered.';
COMMENT ON COLUMN ingest_status.instance IS 'The daemon, by its MQTT client id; "dead-letters replay" is that command.';
COMMENT ON COLUMN ingest_status.received IS 'Readings received; a message that could not be decoded counts as one.';
COMMENT ON COLUMN ingest_status.stored IS 'Readings that became history rows.';
COMMENT ON COLUMN ingest_status.duplicate IS 'Readings and dead letters that were there already.';
COMMENT ON COLUMN ingest_status.dead_lettered IS 'Dead letters written, less those that a replay turned into history.';
COMMENT ON COLUMN ingest_status.presence IS 'Status messages (online, offline) taken; counted apart.';
COMMENT ON COLUMN ingest_status.updated_at IS 'When the last batch was committed.';
