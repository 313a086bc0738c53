-- Runs once, on the new and empty database, as the superuser of the image (/docker-entrypoint-initdb.d). Who may log in,
-- and no more than that: what the three group roles may do comes from sql/roles.sql, each time that the schema is migrated.
-- The group roles are made here so that the owner need not be able to make roles.

\set owner `cat /run/secrets/database_owner`
\set bridge `cat /run/secrets/database_bridge`
\set grafana `cat /run/secrets/database_grafana`
\set web `cat /run/secrets/database_web`

-- No statement of this session is logged, also none that fails: they hold the passwords.
SET log_statement = 'none';
SET log_min_duration_statement = -1;
SET log_min_error_statement = 'panic';

BEGIN;

CREATE ROLE wattbridge_writer NOLOGIN;
CREATE ROLE wattbridge_retention NOLOGIN;
CREATE ROLE wattbridge_reader NOLOGIN;

CREATE ROLE wattbridge_owner LOGIN PASSWORD :'owner';
-- With maintenance.history_days also: GRANT wattbridge_retention TO wattbridge_bridge.
CREATE ROLE wattbridge_bridge LOGIN PASSWORD :'bridge' IN ROLE wattbridge_writer;

-- A dashboard with a mistake in it must not keep the database busy, and need not write.
CREATE ROLE wattbridge_grafana LOGIN PASSWORD :'grafana' CONNECTION LIMIT 20 IN ROLE wattbridge_reader;
ALTER ROLE wattbridge_grafana SET statement_timeout = '60s';
ALTER ROLE wattbridge_grafana SET default_transaction_read_only = on;

-- The pages and the read API. `wattbridge web` sets both itself; here they are for who uses its login by hand.
CREATE ROLE wattbridge_web LOGIN PASSWORD :'web' CONNECTION LIMIT 10 IN ROLE wattbridge_reader;
ALTER ROLE wattbridge_web SET statement_timeout = '60s';
ALTER ROLE wattbridge_web SET default_transaction_read_only = on;

ALTER DATABASE :"DBNAME" OWNER TO wattbridge_owner;
REVOKE ALL ON DATABASE :"DBNAME", postgres, template1 FROM PUBLIC;
-- Batches go through temporary tables.
GRANT CONNECT, TEMPORARY ON DATABASE :"DBNAME" TO wattbridge_writer;
GRANT CONNECT ON DATABASE :"DBNAME" TO wattbridge_reader;

COMMIT;
