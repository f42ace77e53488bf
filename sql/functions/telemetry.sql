-- What gauges are made of: asked every few seconds by every replica.

-- One row a pipeline, cheap enough to ask every few seconds. Columns: whether it is enabled, its lanes as in
-- queue_depths, dead letters; documents and wanting as the last finished walk saw them (null where none has finished
-- since the model or the content was changed), whether a walk is under way or asked for, the rows it has scanned, and the
-- seconds since the last one finished (null: none has). wanting includes what has a message by now.
-- Locks: none. May call: sidecar_runtime, sidecar_reader.
CREATE OR REPLACE FUNCTION sidecar.observe()
RETURNS TABLE (pipeline text, enabled boolean,
               live_depth bigint, live_in_flight bigint, live_oldest_seconds double precision,
               bulk_depth bigint, bulk_in_flight bigint, bulk_oldest_seconds double precision, dead bigint,
               documents bigint, wanting bigint, walking boolean, scanned bigint, sweep_age_seconds double precision)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    WITH d AS MATERIALIZED (SELECT * FROM sidecar.queue_depths())
    SELECT p.name, p.enabled, l.depth, l.in_flight, l.oldest_seconds, b.depth, b.in_flight, b.oldest_seconds, x.depth,
           s.last_documents, s.last_wanting,
           s.finished_at IS NULL AND s.pipeline IS NOT NULL, coalesce(s.scanned, 0),
           CASE WHEN s.last_finished_at IS NOT NULL
                THEN greatest(0, extract(epoch FROM clock_timestamp() - s.last_finished_at))::double precision END
    FROM sidecar.pipelines AS p
    JOIN d AS l ON l.pipeline = p.name AND l.lane = 'live'
    JOIN d AS b ON b.pipeline = p.name AND b.lane = 'bulk'
    JOIN d AS x ON x.pipeline = p.name AND x.lane = 'dead'
    LEFT JOIN sidecar.sweeps AS s ON s.pipeline = p.name
    ORDER BY p.name
$$;

-- What holds vacuum back in this database, ours or not: the age of the oldest transaction in seconds, and how many
-- transactions have begun since the oldest snapshot, prepared transaction or replication slot that vacuum must respect.
-- 0 when there is none; one row of nulls where the owner may not see other sessions (migrate says so).
-- Locks: none. May call: sidecar_runtime, sidecar_reader.
CREATE OR REPLACE FUNCTION sidecar.oldest_transaction()
RETURNS TABLE (age_seconds double precision, xmin_age bigint)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(extract(epoch FROM clock_timestamp() - least(a.started, x.prepared)), 0)::double precision,
           coalesce(greatest(a.age, x.age, s.age), 0)::bigint
    FROM (SELECT min(xact_start) AS started, max(age(backend_xmin)) AS age FROM pg_stat_activity
          WHERE datname = current_database() AND pid <> pg_backend_pid()
          AND backend_type <> 'autovacuum worker') AS a,
         (SELECT min(prepared) AS prepared, max(age(transaction)) AS age FROM pg_prepared_xacts
          WHERE database = current_database()) AS x,
         (SELECT greatest(max(age(xmin)), max(age(catalog_xmin))) AS age FROM pg_replication_slots) AS s
    WHERE pg_has_role('pg_read_all_stats', 'USAGE')
    UNION ALL SELECT NULL, NULL WHERE NOT pg_has_role('pg_read_all_stats', 'USAGE')
$$;
