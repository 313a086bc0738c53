-- Keeps the rollups of quarter hours true. Two watermarks: readings before late_before are marked by the transaction that
-- stores them, and the rollups hold everything before complete_until. late_before goes ahead first; once nobody can be
-- storing a reading any more that he took to be in time, the quarter hours up to it are rolled up.
-- Advisory locks ('wattbridge rollup', 0): shared by those who store readings, exclusive for moving late_before;
-- ('wattbridge rollup', 1): one at a time makes rollups.

CREATE OR REPLACE FUNCTION rollup_advance(target timestamptz) RETURNS timestamptz
LANGUAGE plpgsql SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    wanted timestamptz := date_bin('15 minutes', target, 'epoch');
    known  timestamptz := (SELECT late_before FROM rollup_progress);
BEGIN
    -- Whoever makes rollups has locked the row: not waiting for it while everybody who stores readings waits for us.
    IF wanted <= known OR NOT pg_try_advisory_xact_lock(hashtext('wattbridge rollup'), 1) THEN
        RETURN known;
    END IF;
    PERFORM pg_advisory_xact_lock(hashtext('wattbridge rollup'), 0);
    UPDATE rollup_progress SET late_before = greatest(late_before, wanted) RETURNING late_before INTO known;
    RETURN known;
END
$$;

COMMENT ON FUNCTION rollup_advance(timestamptz) IS
    'Moves late_before on to the start of the quarter hour of target, never back; returns where it is. To be committed at once.';

CREATE OR REPLACE FUNCTION rollup_restart(since timestamptz DEFAULT '-infinity') RETURNS timestamptz
LANGUAGE sql SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    UPDATE rollup_progress
    SET complete_until = greatest(history_since, least(complete_until, date_bin('15 minutes', rollup_restart.since, 'epoch')))
    RETURNING complete_until
$$;

COMMENT ON FUNCTION rollup_restart(timestamptz) IS
    'Lets the rollups be made again from since on (never where history was dropped); returns from where. Until then views read history.';

CREATE OR REPLACE FUNCTION ensure_rollup_partitions(since timestamptz, until timestamptz) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    month  timestamp;
    rollup regclass;
BEGIN
    FOR month IN
        SELECT generate_series(date_trunc('month', since AT TIME ZONE 'UTC'), (until - '1 microsecond'::interval) AT TIME ZONE 'UTC', '1 month')
    LOOP
        FOREACH rollup IN ARRAY ARRAY['charging_two_hours', 'charging_quarter_hour', 'meter_quarter_hour', 'vehicle_quarter_hour']::regclass[] LOOP
            PERFORM ensure_partition(
                rollup, to_char(month, 'YYYYMM'), month AT TIME ZONE 'UTC', (month + '1 month'::interval) AT TIME ZONE 'UTC'
            );
        END LOOP;
    END LOOP;
END
$$;

COMMENT ON FUNCTION ensure_rollup_partitions(timestamptz, timestamptz) IS 'Creates the missing monthly partitions of the rollups for a time.';

CREATE OR REPLACE FUNCTION history_days(since timestamptz) RETURNS SETOF date
LANGUAGE sql STABLE SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
    SELECT DISTINCT to_date(right(partition.relname, 8), 'YYYYMMDD')
    FROM pg_inherits
    JOIN pg_class AS partition ON partition.oid = inhrelid
    WHERE inhparent IN ('meter_history'::regclass, 'vehicle_history'::regclass)
        AND partition.relname ~ '_\d{8}$'
        AND (to_date(right(partition.relname, 8), 'YYYYMMDD') + 1)::timestamp AT TIME ZONE 'UTC' > history_days.since
$$;

COMMENT ON FUNCTION history_days(timestamptz) IS 'The days (UTC) for which there are partitions of history that reach beyond since.';

-- Charging of every two hours between two times that are complete, from the rollups of their quarter hours; of all vehicles, or of some.
CREATE OR REPLACE FUNCTION rollup_two_hours(since timestamptz, until timestamptz, vehicles text[] DEFAULT NULL) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
AS $$
DECLARE
    first_block timestamptz := date_bin('2 hours', since, 'epoch');
    end_block   timestamptz := date_bin('2 hours', until, 'epoch');
BEGIN
    DELETE FROM charging_two_hours AS rollup
    WHERE rollup.two_hours >= first_block AND rollup.two_hours < end_block AND (vehicles IS NULL OR rollup.vehicle_id = ANY (vehicles));
    INSERT INTO charging_two_hours (vehicle_id, meter_id, two_hours, minutes, matched_ac, matched_dc)
    SELECT
        rollup.vehicle_id,
        rollup.meter_id,
        date_bin('2 hours', rollup.quarter_hour, 'epoch') AS two_hours,
        sum(rollup.minutes),
        sum(rollup.matched_ac),
        sum(rollup.matched_dc)
    FROM charging_quarter_hour AS rollup
    WHERE rollup.quarter_hour >= first_block AND rollup.quarter_hour < end_block AND (vehicles IS NULL OR rollup.vehicle_id = ANY (vehicles))
    GROUP BY rollup.vehicle_id, rollup.meter_id, two_hours
    ORDER BY two_hours, rollup.vehicle_id;
END
$$;

COMMENT ON FUNCTION rollup_two_hours(timestamptz, timestamptz, text[]) IS 'Makes charging_two_hours again for every two hours that are whole between two times, for some vehicles (NULL: all).';

-- Marked quarter hours from history again. A mark of more than a day is taken a day at a time, the newest first.
CREATE OR REPLACE FUNCTION rollup_marks(most_marks integer, since timestamptz, until timestamptz) RETURNS void
LANGUAGE plpgsql
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET jit = off
AS $$
DECLARE
    marks    rollup_mark[];
    first_ts timestamptz;
    devices  text[];
    sinces   timestamptz[];
    untils   timestamptz[];
BEGIN
    -- Who stores a reading and its mark later than this comes later: his mark stays.
    WITH taken AS (
        DELETE FROM rollup_mark WHERE ctid = ANY (ARRAY(SELECT ctid FROM rollup_mark LIMIT most_marks)) RETURNING rollup_mark.*
    )
    SELECT array_agg(taken::rollup_mark) INTO marks FROM taken;
    IF marks IS NULL THEN
        RETURN;
    END IF;

    SELECT coalesce(greatest(since, min(day)::timestamp AT TIME ZONE 'UTC'), until) INTO first_ts FROM history_days(since) AS day;
    WITH mark AS (
        SELECT device_id, kind, quarter_hours * tstzrange(first_ts, greatest(first_ts, until)) AS quarter_hours
        FROM unnest(marks)
    ),
    rest AS (
        INSERT INTO rollup_mark (device_id, kind, quarter_hours)
        SELECT mark.device_id, mark.kind, tstzrange(lower(mark.quarter_hours), upper(mark.quarter_hours) - '1 day'::interval)
        FROM mark
        WHERE upper(mark.quarter_hours) - lower(mark.quarter_hours) > '1 day'
    )
    SELECT array_agg((
        mark.device_id, mark.kind, 0,
        mark.quarter_hours * tstzrange(upper(mark.quarter_hours) - '1 day'::interval, NULL)
    )::rollup_mark) INTO marks
    FROM mark
    WHERE NOT isempty(mark.quarter_hours);
    IF marks IS NULL THEN
        RETURN;
    END IF;
    PERFORM ensure_rollup_partitions(min(lower(mark.quarter_hours)), max(upper(mark.quarter_hours)))
    FROM unnest(marks) AS mark
    GROUP BY date_trunc('month', lower(mark.quarter_hours), 'UTC');

    -- Pieces of time of devices, merged.
    SELECT array_agg(device_id), array_agg(lower(piece)), array_agg(upper(piece)) INTO devices, sinces, untils
    FROM (SELECT device_id, range_agg(quarter_hours) AS pieces FROM unnest(marks) WHERE kind = 'meter' GROUP BY device_id) AS merged
    CROSS JOIN LATERAL unnest(pieces) AS piece;
    DELETE FROM meter_quarter_hour AS rollup
    USING unnest(devices, sinces, untils) AS piece (meter_id, since, until)
    WHERE rollup.meter_id = piece.meter_id AND rollup.quarter_hour >= piece.since AND rollup.quarter_hour < piece.until;
    INSERT INTO meter_quarter_hour SELECT * FROM meter_quarters_of(devices, sinces, untils);

    SELECT array_agg(device_id), array_agg(lower(piece)), array_agg(upper(piece)) INTO devices, sinces, untils
    FROM (SELECT device_id, range_agg(quarter_hours) AS pieces FROM unnest(marks) WHERE kind = 'vehicle' GROUP BY device_id) AS merged
    CROSS JOIN LATERAL unnest(pieces) AS piece;
    DELETE FROM vehicle_quarter_hour AS rollup
    USING unnest(devices, sinces, untils) AS piece (vehicle_id, since, until)
    WHERE rollup.vehicle_id = piece.vehicle_id AND rollup.quarter_hour >= piece.since AND rollup.quarter_hour < piece.until;
    INSERT INTO vehicle_quarter_hour SELECT * FROM vehicle_quarters_of(devices, sinces, untils);

    -- What happened at a meter concerns every vehicle that was there.
    SELECT array_agg(vehicle_id), array_agg(lower(piece)), array_agg(upper(piece)) INTO devices, sinces, untils
    FROM (
        SELECT concerned.vehicle_id, range_agg(concerned.quarter_hours) AS pieces
        FROM (
            SELECT mark.device_id AS vehicle_id, mark.quarter_hours FROM unnest(marks) AS mark WHERE mark.kind = 'vehicle'
            UNION ALL
            SELECT rollup.vehicle_id, tstzrange(rollup.quarter_hour, rollup.quarter_hour + '15 minutes'::interval)
            FROM unnest(marks) AS mark
            JOIN charging_quarter_hour AS rollup
                ON rollup.meter_id = mark.device_id
                AND rollup.quarter_hour >= lower(mark.quarter_hours) AND rollup.quarter_hour < upper(mark.quarter_hours)
            WHERE mark.kind = 'meter'
        ) AS concerned
        GROUP BY concerned.vehicle_id
    ) AS merged
    CROSS JOIN LATERAL unnest(pieces) AS piece;
    IF devices IS NULL THEN
        RETURN;
    END IF;
    DELETE FROM charging_quarter_hour AS rollup
    USING unnest(devices, sinces, untils) AS piece (vehicle_id, since, until)
    WHERE rollup.vehicle_id = piece.vehicle_id AND rollup.quarter_hour >= piece.since AND rollup.quarter_hour < piece.until;
    INSERT INTO charging_quarter_hour SELECT * FROM charging_of(devices, sinces, untils);
    PERFORM rollup_two_hours(
        min(piece.since), least(max(piece.until) + '2 hours'::interval, rollup_marks.until), array_agg(DISTINCT piece.vehicle_id)
    )
    FROM unnest(devices, sinces, untils) AS piece (vehicle_id, since, until)
    GROUP BY date_bin('1 day', piece.since, 'epoch');
END
$$;

COMMENT ON FUNCTION rollup_marks(integer, timestamptz, timestamptz) IS
    'Makes at most so many marked quarter hours between two times again, and deletes their marks.';

CREATE OR REPLACE FUNCTION rollup_refresh(longest interval DEFAULT '1 hour', most_marks integer DEFAULT 500)
RETURNS TABLE (complete_until timestamptz, late_before timestamptz, marks_left bigint)
LANGUAGE plpgsql SECURITY DEFINER
SET search_path FROM CURRENT
SET plan_cache_mode = force_custom_plan
SET enable_seqscan = off
SET jit = off
AS $$
#variable_conflict use_column
DECLARE
    progress rollup_progress;
    begins   timestamptz;
    ends     timestamptz;
BEGIN
    IF longest < '15 minutes' OR most_marks < 1 THEN
        RAISE EXCEPTION 'a step of rollup_refresh takes at least 15 minutes and one mark';
    END IF;
    IF NOT pg_try_advisory_xact_lock(hashtext('wattbridge rollup'), 1) THEN
        RETURN;
    END IF;
    SELECT * INTO progress FROM rollup_progress FOR UPDATE;

    PERFORM rollup_marks(most_marks, progress.history_since, progress.complete_until);

    IF progress.complete_until < progress.late_before THEN
        SELECT greatest(progress.complete_until, min(day)::timestamp AT TIME ZONE 'UTC') INTO begins
        FROM history_days(progress.complete_until) AS day;
        ends := least(progress.late_before, date_bin('15 minutes', begins + longest, 'epoch'));
        IF begins < ends THEN
            PERFORM ensure_rollup_partitions(begins, ends);
            DELETE FROM meter_quarter_hour AS rollup WHERE rollup.quarter_hour >= begins AND rollup.quarter_hour < ends;
            INSERT INTO meter_quarter_hour
            SELECT * FROM meter_quarters_between(begins, ends) AS rollup ORDER BY rollup.quarter_hour, rollup.meter_id;
            DELETE FROM vehicle_quarter_hour AS rollup WHERE rollup.quarter_hour >= begins AND rollup.quarter_hour < ends;
            INSERT INTO vehicle_quarter_hour
            SELECT * FROM vehicle_quarters_between(begins, ends) AS rollup ORDER BY rollup.quarter_hour, rollup.vehicle_id;
            DELETE FROM charging_quarter_hour AS rollup WHERE rollup.quarter_hour >= begins AND rollup.quarter_hour < ends;
            INSERT INTO charging_quarter_hour
            SELECT * FROM charging_between(begins, ends) AS rollup ORDER BY rollup.quarter_hour, rollup.vehicle_id;
            PERFORM rollup_two_hours(begins, ends);
        ELSE
            ends := progress.late_before;
        END IF;
        progress.complete_until := ends;
        UPDATE rollup_progress SET complete_until = ends;
    END IF;
    RETURN QUERY SELECT progress.complete_until, progress.late_before, (SELECT count(*) FROM rollup_mark);
END
$$;

COMMENT ON FUNCTION rollup_refresh(interval, integer) IS
    'One step of the rollups, in one transaction: some marks, then at most so long a time. Returns how far they are; no row while somebody else is at it.';

CREATE OR REPLACE FUNCTION drop_history_before(day date) RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
DECLARE
    cut     timestamptz := day::timestamp AT TIME ZONE 'UTC';
    dropped integer := 0;
    old     regclass;
BEGIN
    IF NOT EXISTS (SELECT FROM history_days('-infinity') AS old_day WHERE old_day < day)
        OR NOT pg_try_advisory_xact_lock(hashtext('wattbridge rollup'), 1)
    THEN
        RETURN 0;
    END IF;
    -- Nobody stores anything more, and nobody reads: only then it is certain that the rollups hold all of it.
    PERFORM pg_advisory_xact_lock(hashtext('wattbridge rollup'), 0);
    LOCK TABLE ONLY meter_history, vehicle_history IN ACCESS EXCLUSIVE MODE;
    IF EXISTS (SELECT FROM rollup_progress WHERE complete_until < cut)
        OR EXISTS (SELECT FROM rollup_mark WHERE quarter_hours && tstzrange(NULL, cut))
    THEN
        RETURN 0;
    END IF;
    FOR old IN
        SELECT partition.oid::regclass
        FROM pg_inherits
        JOIN pg_class AS partition ON partition.oid = inhrelid
        WHERE inhparent IN ('meter_history'::regclass, 'vehicle_history'::regclass)
            AND partition.relname ~ '_\d{8}$'
            AND to_date(right(partition.relname, 8), 'YYYYMMDD') < day
    LOOP
        EXECUTE format('DROP TABLE %s', old);
        dropped := dropped + 1;
    END LOOP;
    IF dropped > 0 THEN
        UPDATE rollup_progress SET history_since = greatest(history_since, cut);
    END IF;
    RETURN dropped;
END
$$;

COMMENT ON FUNCTION drop_history_before(date) IS
    'Retention: drops the daily partitions of history before a day (UTC), once the rollups hold them; these stay. Returns how many.';

CREATE OR REPLACE FUNCTION whole_quarter_hours(valid tstzrange) RETURNS tstzrange
LANGUAGE sql IMMUTABLE
AS $$
    SELECT tstzrange(
        date_bin('15 minutes', coalesce(lower(valid), '-infinity'), 'epoch'),
        date_bin('15 minutes', coalesce(upper(valid), 'infinity'), 'epoch') + '15 minutes'::interval
    )
$$;

COMMENT ON FUNCTION whole_quarter_hours(tstzrange) IS 'The quarter hours that a range of time touches.';

-- Concerned are the vehicle, the meter, and the meter where the naming rule has the vehicle without an assignment.
CREATE OR REPLACE FUNCTION mark_reassigned() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    INSERT INTO rollup_mark (device_id, kind, quarter_hours)
    SELECT device.id, device.kind, whole_quarter_hours(changed.valid)
    FROM changed
    CROSS JOIN analytics_setting AS setting
    CROSS JOIN LATERAL (
        VALUES
            (changed.vehicle_id, 'vehicle'),
            (changed.meter_id, 'meter'),
            (
                CASE
                    WHEN starts_with(changed.vehicle_id, setting.vehicle_prefix)
                    THEN setting.meter_prefix || substr(changed.vehicle_id, length(setting.vehicle_prefix) + 1)
                END,
                'meter'
            )
    ) AS device (id, kind)
    WHERE device.id IS NOT NULL;
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION mark_reassigned() IS 'Trigger: marks what a change of charger_assignment makes untrue.';

CREATE OR REPLACE FUNCTION restart_rollups() RETURNS trigger
LANGUAGE plpgsql SECURITY DEFINER
SET search_path FROM CURRENT
AS $$
BEGIN
    PERFORM rollup_restart();
    RETURN NULL;
END
$$;

COMMENT ON FUNCTION restart_rollups() IS 'Trigger: after a change that may concern all rollups, all of them are made again.';

CREATE OR REPLACE TRIGGER assigned AFTER INSERT ON charger_assignment
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION mark_reassigned();
CREATE OR REPLACE TRIGGER unassigned AFTER DELETE ON charger_assignment
    REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION mark_reassigned();
-- An update is both.
CREATE OR REPLACE TRIGGER reassigned_from AFTER UPDATE ON charger_assignment
    REFERENCING OLD TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION mark_reassigned();
CREATE OR REPLACE TRIGGER reassigned_to AFTER UPDATE ON charger_assignment
    REFERENCING NEW TABLE AS changed FOR EACH STATEMENT EXECUTE FUNCTION mark_reassigned();
CREATE OR REPLACE TRIGGER unassigned_all AFTER TRUNCATE ON charger_assignment
    FOR EACH STATEMENT EXECUTE FUNCTION restart_rollups();

CREATE OR REPLACE TRIGGER set_otherwise AFTER UPDATE OF late_after, vehicle_prefix, meter_prefix ON analytics_setting
    FOR EACH ROW
    WHEN (
        (OLD.late_after, OLD.vehicle_prefix, OLD.meter_prefix) IS DISTINCT FROM (NEW.late_after, NEW.vehicle_prefix, NEW.meter_prefix)
    )
    EXECUTE FUNCTION restart_rollups();
