-- What people and scrapers look at.

-- Depth of every queue. Columns: pipeline, lane (live, bulk, dead), depth (in flight included), in_flight,
-- oldest_seconds (0 when empty). Locks: none. May call: sidecar_runtime, sidecar_reader.
CREATE OR REPLACE FUNCTION sidecar.queue_depths()
RETURNS TABLE (pipeline text, lane text, depth bigint, in_flight bigint, oldest_seconds double precision)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_name text;
    v_queue text;
    v_lane text;
BEGIN
    FOR v_name, v_queue IN SELECT q.name, q.queue FROM sidecar.pipelines AS q ORDER BY q.name LOOP
        FOREACH v_lane IN ARRAY ARRAY['live', 'bulk', 'dead'] LOOP
            RETURN QUERY EXECUTE format(
                'SELECT $1, $2, count(*), count(*) FILTER (WHERE vt > clock_timestamp()), '
                'greatest(0, coalesce(extract(epoch FROM clock_timestamp() - min(enqueued_at)), 0))::double precision '
                'FROM %s', sidecar._queue_table(v_queue, v_lane)) USING v_name, v_lane;
        END LOOP;
    END LOOP;
END $$;

-- Documents of one pipeline, counted exactly: reads and hashes the whole source. Columns: documents (not blank),
-- embedded (vectors of the current text by the current model), stale (older text or another model), missing.
-- Locks: none. May call: sidecar_runtime, sidecar_reader.
CREATE OR REPLACE FUNCTION sidecar.count_documents(p_pipeline text)
RETURNS TABLE (documents bigint, embedded bigint, stale bigint, missing bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_nestloop = off AS $$
DECLARE
    p sidecar.pipelines := sidecar._intact(p_pipeline);
BEGIN
    RETURN QUERY EXECUTE format($q$
        SELECT count(*) FILTER (WHERE NOT c.blank),
               count(*) FILTER (WHERE NOT c.blank AND e.%1$I IS NOT NULL AND c.current),
               count(*) FILTER (WHERE e.%1$I IS NOT NULL AND (c.blank OR NOT c.current)),
               count(*) FILTER (WHERE NOT c.blank AND e.%1$I IS NULL)
        FROM %2$s AS s LEFT JOIN %3$s AS e ON e.%1$I %4$s s.%5$I AND e.chunk_no = 0
        CROSS JOIN LATERAL (SELECT sidecar._blank(%6$s) AS blank, coalesce(e.source_text_hash = md5(%6$s)
            AND e.model = coalesce($1, e.model), false) AS current) AS c
    $q$, p.embeddings_key, sidecar._table(p.name, p.source), sidecar._table(p.name, p.embeddings), p.key_equals,
         p.key_column, sidecar._content(p, 's'))
    USING p.model_id;
END $$;

-- One row a pipeline. coverage = embedded / documents, 1 when there are none; index_state as in list_indexes.
-- Locks: none. May select: sidecar_runtime, sidecar_reader.
CREATE OR REPLACE VIEW sidecar.status AS
    SELECT p.name, p.source::text AS source, p.embeddings::text AS embeddings, coalesce(p.model_id, p.model) AS model,
           p.enabled, l.depth AS live_depth, l.in_flight AS live_in_flight, l.oldest_seconds AS live_oldest_seconds,
           b.depth AS bulk_depth, b.in_flight AS bulk_in_flight, b.oldest_seconds AS bulk_oldest_seconds,
           d.depth AS dead, c.documents, c.embedded, c.stale, c.missing,
           CASE WHEN c.documents = 0 THEN 1 ELSE c.embedded::double precision / c.documents END AS coverage,
           i.state AS index_state
    FROM sidecar.pipelines AS p
    JOIN sidecar.list_indexes() AS i ON i.pipeline = p.name
    JOIN sidecar.queue_depths() AS l ON l.pipeline = p.name AND l.lane = 'live'
    JOIN sidecar.queue_depths() AS b ON b.pipeline = p.name AND b.lane = 'bulk'
    JOIN sidecar.queue_depths() AS d ON d.pipeline = p.name AND d.lane = 'dead'
    CROSS JOIN LATERAL sidecar.count_documents(p.name) AS c;

-- Rows of the view for a role that may only execute. Locks: none. May call: sidecar_runtime, sidecar_reader.
CREATE OR REPLACE FUNCTION sidecar.list_status()
RETURNS SETOF sidecar.status
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT * FROM sidecar.status ORDER BY name
$$;
