-- The first words of each transaction that stores readings: the lock is held before the watermark is read, and the watermark
-- stands still until the commit. Two statements, and so two snapshots, in one round trip.
SELECT pg_advisory_xact_lock_shared(hashtext('wattbridge rollup'), 0);
SELECT extract(epoch FROM late_before)::double precision FROM rollup_progress
