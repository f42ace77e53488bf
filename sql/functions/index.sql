-- The index on a pipeline's vectors: how it is, and the statements that make and drop it. They are handed out, not run
-- here: CONCURRENTLY no writer waits, and it runs in no function and in no transaction.
-- Whoever runs them holds the advisory lock _index_lock for its session, so that one works at a time and all see it.
-- Locks: none that others wait for, but where a function says so. May call: see each function.

-- Key of the session's advisory lock under which an index is built or dropped. May call: the functions of this schema.
CREATE OR REPLACE FUNCTION sidecar._index_lock(p_pipeline text)
RETURNS bigint
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT hashtextextended('index' || chr(31) || p_pipeline, 8088)
$$;

-- Indexes that serve sidecar.search, of whatever kind: on the vectors, by cosine, of all rows. An interrupted build or
-- drop leaves one that is not valid, which costs every write and serves no search. May call: the functions of this schema.
CREATE OR REPLACE FUNCTION sidecar._vector_indexes(p_embeddings regclass)
RETURNS TABLE (id regclass, valid boolean)
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT i.indexrelid::regclass, i.indisvalid AND i.indisready AND i.indislive
    FROM pg_index AS i
    JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] AND a.attname = 'embedding'
    JOIN pg_opclass AS c ON c.oid = i.indclass[0] AND c.opcname = 'vector_cosine_ops'
    WHERE i.indrelid = p_embeddings AND i.indpred IS NULL
    ORDER BY 1
$$;

-- Whether attach puts the index off until after the load: at attach every row wants a vector, so only the size decides.
-- Up to 10,000 rows a live index costs about a millisecond a row, seconds in all; then it grows (6 ms a row at 100,000)
-- beyond what building it afterwards costs (0.4 ms a row). Reads 10,001 rows at most: a new table has no statistics.
-- May call: attach.
CREATE OR REPLACE FUNCTION sidecar._is_large(p_source regclass)
RETURNS boolean
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_large boolean;
BEGIN
    EXECUTE format('SELECT count(*) > 10000 FROM (SELECT FROM %s LIMIT 10001) AS s', p_source) INTO v_large;
    RETURN v_large;
END $$;

-- The index of every pipeline. Columns: state (live; deferred: built after the load; building; missing: lost; invalid: a
-- build or a drop was interrupted; none: not wanted), backfilling (a backfill walks, the bulk lane holds messages,
-- or the live lane 1,000 of them: a load that goes on), bytes (of what is live), and of a build under way, where the owner may see other sessions: phase, blocks of the table,
-- tuples, and transactions that it waits for.
-- May call: sidecar_runtime, sidecar_reader.
CREATE OR REPLACE FUNCTION sidecar.list_indexes()
RETURNS TABLE (pipeline text, state text, backfilling boolean, bytes bigint, phase text, blocks_done bigint,
               blocks_total bigint, tuples_done bigint, lockers_done bigint, lockers_total bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p sidecar.pipelines;
    v_valid boolean;
    v_held boolean;
    v_lane text;
BEGIN
    FOR p IN SELECT * FROM sidecar.pipelines ORDER BY name LOOP
        pipeline := p.name;
        state := NULL; phase := NULL; blocks_done := NULL; blocks_total := NULL; tuples_done := NULL;
        lockers_done := NULL; lockers_total := NULL;
        -- null: no index at all
        SELECT bool_or(i.valid), sum(pg_relation_size(i.id)) FILTER (WHERE i.valid) INTO v_valid, bytes
        FROM sidecar._vector_indexes(p.embeddings) AS i;
        IF v_valid THEN
            state := 'live';
        ELSIF NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = p.embeddings) THEN
            state := 'none';  -- whatever it was, it went with its table
        ELSE
            SELECT s.phase, s.blocks_done, s.blocks_total, s.tuples_done, s.lockers_done, s.lockers_total
            INTO phase, blocks_done, blocks_total, tuples_done, lockers_done, lockers_total
            FROM pg_stat_progress_create_index AS s
            WHERE s.datname = current_database() AND s.relid = p.embeddings LIMIT 1;
            v_held := EXISTS (
                SELECT FROM pg_locks AS l WHERE l.locktype = 'advisory' AND l.objsubid = 1 AND l.granted
                AND l.database = (SELECT d.oid FROM pg_database AS d WHERE d.datname = current_database())
                AND (l.classid::bigint << 32 | l.objid::bigint) = sidecar._index_lock(p.name));
            state := CASE
                WHEN phase IS NOT NULL OR v_held AND p.index_mode = 'live' THEN 'building'
                WHEN v_valid IS NOT NULL AND NOT v_held THEN 'invalid'
                WHEN p.index_mode = 'live' THEN 'missing'
                ELSE p.index_mode END;
        END IF;
        SELECT s.backfill AND s.finished_at IS NULL INTO backfilling FROM sidecar.sweeps AS s WHERE s.pipeline = p.name;
        FOREACH v_lane IN ARRAY ARRAY['bulk', 'live'] LOOP
            CONTINUE WHEN backfilling OR to_regclass(sidecar._queue_table(p.queue, v_lane)) IS NULL;
            EXECUTE format('SELECT count(*) = $1 FROM (SELECT FROM %s LIMIT $1) AS l', sidecar._queue_table(p.queue, v_lane))
            INTO backfilling USING CASE v_lane WHEN 'bulk' THEN 1 ELSE 1000 END;
        END LOOP;
        backfilling := coalesce(backfilling, false);
        RETURN NEXT;
    END LOOP;
END $$;

-- What is needed to build or drop a pipeline's index. Columns: embeddings and dimensions, owner of the table and whether
-- the caller may act as it, lock_key, create_statement, and for each index that is there its name, its definition,
-- the statement that drops it, and whether it is valid.
-- Runs as the caller. May call: members of the owner of schema sidecar. Raises SC002, 42P01, and SC010 where pgvector
-- has no index for so many dimensions.
CREATE OR REPLACE FUNCTION sidecar.index_plan(p_pipeline text)
RETURNS TABLE (embeddings text, dimensions integer, owner name, owned boolean, lock_key bigint, create_statement text,
               names text[], definitions text[], drop_statements text[], valid boolean[])
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p sidecar.pipelines := sidecar._intact(p_pipeline);
BEGIN
    IF p.dimensions > 2000 THEN
        PERFORM sidecar._refuse('pgvector has no index for vectors of more than 2000 dimensions, and pipeline %s has %s: '
            'its searches stay exact', p.name, p.dimensions::text);
    END IF;
    RETURN QUERY
        SELECT p.embeddings::text, p.dimensions, r.rolname, pg_has_role(c.relowner, 'USAGE'),
               sidecar._index_lock(p.name), format(
                   'CREATE INDEX CONCURRENTLY ON %s USING hnsw (embedding @extschema:vector@.vector_cosine_ops)',
                   p.embeddings),
               i.names, i.definitions, i.drops, i.valid
        FROM pg_class AS c JOIN pg_roles AS r ON r.oid = c.relowner
        CROSS JOIN LATERAL (
            SELECT coalesce(array_agg(v.id::text ORDER BY v.id), '{}') AS names,
                   coalesce(array_agg(pg_get_indexdef(v.id) ORDER BY v.id), '{}') AS definitions,
                   coalesce(array_agg(format('DROP INDEX CONCURRENTLY IF EXISTS %s', v.id) ORDER BY v.id), '{}') AS drops,
                   coalesce(array_agg(v.valid ORDER BY v.id), '{}') AS valid
            FROM sidecar._vector_indexes(p.embeddings) AS v) AS i
        WHERE c.oid = p.embeddings;
END $$;

-- Records what is wanted of the index: live or deferred. Before it is built or dropped, so that what is interrupted is
-- told as a fault. Locks: the pipeline's row. May call: members of the owner of schema sidecar. Raises SC002.
CREATE OR REPLACE FUNCTION sidecar.record_index(p_pipeline text, p_mode text)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM sidecar._pipeline(p_pipeline);
    UPDATE sidecar.pipelines SET index_mode = p_mode, updated_at = now() WHERE name = p_pipeline;
END $$;
