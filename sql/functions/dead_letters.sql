-- Dead letters: moving messages there, looking at them, replaying and purging them.
-- A dead letter's message: document_id, reason, detail, attempts, content_hash, lane, enqueued_at, dead_at, message
-- (as the writer sent it). A document has at most one: a newer one replaces an older.

-- Moves one document's messages out of the lanes, as one dead letter, in one statement: never both queues, never
-- neither. Vectors of older text are removed, so that nothing stale is found. p_key is null for a foreign shape;
-- p_content_hash is null when the text was never read: the hash is then taken here, unless that text has its vector: then
-- it is not what this letter is about, and a later sweep must not pass it over.
-- Returns how many messages were still ours; 0 means the leases were lost and nothing was done.
-- Locks: advisory xact lock of the document, row locks on its messages, older dead letters, vectors and claims.
-- May call: sidecar_runtime.
CREATE OR REPLACE FUNCTION sidecar.dead_letter(
    p_pipeline text, p_key text, p_lanes text[], p_ids bigint[], p_read_cts integer[],
    p_attempts integer, p_reason text, p_detail text, p_content_hash text)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '500ms' AS $$
DECLARE
    p sidecar.pipelines := sidecar._intact(p_pipeline);
    v_current text;
    v_answered boolean := false;
    v_count integer;
BEGIN
    IF p_key IS NOT NULL THEN
        PERFORM sidecar._lock_documents(p_pipeline, ARRAY[p_key]);
        BEGIN
            EXECUTE format('SELECT md5(%s) FROM %s AS s WHERE s.%I %s $1::%s',
                sidecar._content(p, 's'), sidecar._table(p.name, p.source), p.key_column, p.key_equals, p.key_type)
            INTO v_current USING p_key;
        EXCEPTION WHEN data_exception THEN
            v_current := NULL;  -- a row that cannot be rendered: that may be the very reason why it is here
        END;
        EXECUTE format('SELECT EXISTS (SELECT FROM %s AS e WHERE e.%I %s $1::%s AND e.source_text_hash = $2 AND e.model = $3)',
            sidecar._table(p.name, p.embeddings), p.embeddings_key, p.key_equals, p.key_type)
        INTO v_answered USING p_key, v_current, p.model_id;
    END IF;
    EXECUTE format($q$
        WITH fence AS (SELECT * FROM unnest($1, $2, $3) AS f (lane, msg_id, read_ct)),
        live AS (DELETE FROM %1$s AS q USING fence AS f
                 WHERE f.lane = 'live' AND q.msg_id = ANY ($2) AND q.msg_id = f.msg_id AND q.read_ct = f.read_ct
                 RETURNING f.lane, q.msg_id, q.enqueued_at, q.message),
        bulk AS (DELETE FROM %2$s AS q USING fence AS f
                 WHERE f.lane = 'bulk' AND q.msg_id = ANY ($2) AND q.msg_id = f.msg_id AND q.read_ct = f.read_ct
                 RETURNING f.lane, q.msg_id, q.enqueued_at, q.message),
        taken AS (SELECT * FROM live UNION ALL SELECT * FROM bulk),
        older AS (DELETE FROM %3$s AS q WHERE q.message ->> 'document_id' = $4 AND EXISTS (SELECT FROM taken)),
        dead AS (INSERT INTO %3$s (vt, message)
                 SELECT clock_timestamp(), jsonb_build_object(
                     'document_id', coalesce($4, sidecar._named_key(t.message)), 'reason', $5, 'detail', $6,
                     'attempts', $7, 'content_hash', coalesce($8, $9), 'lane', t.lane, 'enqueued_at', t.enqueued_at,
                     'dead_at', clock_timestamp(), 'message', t.message)
                 FROM taken AS t ORDER BY t.enqueued_at, t.msg_id LIMIT 1)
        SELECT count(*) FROM taken
    $q$, sidecar._queue_table(p.queue, 'live'), sidecar._queue_table(p.queue, 'bulk'),
         sidecar._queue_table(p.queue, 'dead'))
    INTO v_count USING p_lanes, p_ids, p_read_cts, p_key, p_reason, p_detail, p_attempts, p_content_hash,
        CASE WHEN NOT v_answered THEN v_current END;
    IF v_count > 0 AND p_key IS NOT NULL THEN
        EXECUTE format('DELETE FROM %s AS e WHERE e.%I %s $1::%s AND e.source_text_hash IS DISTINCT FROM $2',
            sidecar._table(p.name, p.embeddings), p.embeddings_key, p.key_equals, p.key_type)
        USING p_key, v_current;
    END IF;
    IF v_count > 0 AND p_key IS NOT NULL THEN
        PERFORM sidecar._answer_claims(p_pipeline, ARRAY[p_key], ARRAY[coalesce(p_content_hash, v_current)]);
    END IF;
    RETURN v_count;
END $$;

-- Moves dead letters back to the live lane with a clean count; all of them when p_ids is null. Returns how many.
-- Locks: row locks on the dead letters. May call: sidecar_runtime.
CREATE OR REPLACE FUNCTION sidecar.replay(p_pipeline text, p_ids bigint[] DEFAULT NULL)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p sidecar.pipelines := sidecar._pipeline(p_pipeline);
    v_count integer;
BEGIN
    EXECUTE format(
        'WITH d AS (DELETE FROM %s WHERE $1 IS NULL OR msg_id = ANY ($1) RETURNING message) '
        'INSERT INTO %s (vt, message) SELECT clock_timestamp(), '
        'CASE jsonb_typeof(d.message -> ''message'') WHEN ''object'' THEN (d.message -> ''message'') - ''sidecar'' '
        'ELSE d.message -> ''message'' END FROM d',
        sidecar._queue_table(p.queue, 'dead'), sidecar._queue_table(p.queue, 'live')) USING p_ids;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    IF v_count > 0 THEN
        PERFORM pg_notify('sidecar', 'live:' || p_pipeline);
    END IF;
    RETURN v_count;
END $$;

-- Deletes dead letters; all of them when p_ids is null. Returns how many.
-- Locks: row locks on the dead letters. May call: sidecar_runtime.
CREATE OR REPLACE FUNCTION sidecar.purge(p_pipeline text, p_ids bigint[] DEFAULT NULL)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_count integer;
BEGIN
    EXECUTE format('DELETE FROM %s WHERE $1 IS NULL OR msg_id = ANY ($1)',
        sidecar._queue_table((sidecar._pipeline(p_pipeline)).queue, 'dead')) USING p_ids;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    RETURN v_count;
END $$;

-- The dead letters of one pipeline, oldest first. resolved: the document is gone, blank, changed since, or embedded.
-- Locks: none. May call: sidecar_runtime, sidecar_reader.
CREATE OR REPLACE FUNCTION sidecar.list_dead_letters(p_pipeline text)
RETURNS TABLE (
    pipeline text, id bigint, document_id text, reason text, detail text, attempts integer, content_hash text,
    lane text, enqueued_at timestamptz, dead_at timestamptz, resolved boolean, message jsonb)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p sidecar.pipelines := sidecar._intact(p_pipeline);
    v_ids bigint[];
    v_keys text[];
BEGIN
    EXECUTE format(
        'SELECT array_agg(msg_id ORDER BY msg_id), array_agg(message ->> ''document_id'' ORDER BY msg_id) FROM %s',
        sidecar._queue_table(p.queue, 'dead')) INTO v_ids, v_keys;
    v_keys := sidecar._canonical_keys(p.key_type, v_keys);
    RETURN QUERY EXECUTE format($q$
        SELECT $1, d.msg_id, d.message ->> 'document_id', d.message ->> 'reason', d.message ->> 'detail',
               sidecar._whole(d.message -> 'attempts'), d.message ->> 'content_hash', d.message ->> 'lane',
               (d.message ->> 'enqueued_at')::timestamptz, (d.message ->> 'dead_at')::timestamptz,
               k.key IS NOT NULL AND (
                   s.%1$I IS NULL OR md5(c.content) IS DISTINCT FROM d.message ->> 'content_hash'
                   OR EXISTS (SELECT FROM %2$s AS e WHERE e.%3$I %4$s k.key::%5$s AND e.chunk_no = 0
                              AND e.source_text_hash = md5(c.content)
                              AND e.model IS NOT DISTINCT FROM coalesce($4, e.model))),
               d.message -> 'message'
        FROM %6$s AS d
        JOIN unnest($2, $3) AS k (msg_id, key) ON k.msg_id = d.msg_id
        LEFT JOIN %7$s AS s ON s.%1$I %4$s k.key::%5$s
        CROSS JOIN LATERAL (SELECT %8$s AS content) AS c
        ORDER BY d.msg_id
    $q$, p.key_column, sidecar._table(p.name, p.embeddings), p.embeddings_key, p.key_equals, p.key_type,
         sidecar._queue_table(p.queue, 'dead'), sidecar._table(p.name, p.source), sidecar._content(p, 's'))
    USING p_pipeline, v_ids, v_keys, p.model_id;
END $$;

-- The newest dead letters of one pipeline, newest first, at most p_limit: what a status page shows. Columns: document_id
-- (null where the message names none), reason, age_seconds, attempts (null where it tells none). Never the detail or the
-- message; what a foreign message may hold in place of an id is cut short. Reads no more than it returns.
-- Locks: none. May call: sidecar_runtime, sidecar_reader.
CREATE OR REPLACE FUNCTION sidecar.newest_dead_letters(p_pipeline text, p_limit integer)
RETURNS TABLE (document_id text, reason text, age_seconds double precision, attempts integer)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY EXECUTE format($q$
        SELECT left(d.message ->> 'document_id', 200), left(d.message ->> 'reason', 64),
               greatest(0, extract(epoch FROM clock_timestamp() - d.enqueued_at))::double precision,
               sidecar._whole(d.message -> 'attempts')
        FROM %s AS d ORDER BY d.msg_id DESC LIMIT $1
    $q$, sidecar._queue_table((sidecar._pipeline(p_pipeline)).queue, 'dead')) USING p_limit;
END $$;

-- A whole number from JSON, or null. Locks: none. May call: the functions of this schema.
CREATE OR REPLACE FUNCTION sidecar._whole(p_value jsonb)
RETURNS integer
LANGUAGE sql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE WHEN p_value #>> '{}' ~ '^[0-9]{1,9}$' THEN (p_value #>> '{}')::integer END
$$;

-- All dead letters. Locks: none. May select: sidecar_runtime, sidecar_reader.
CREATE OR REPLACE VIEW sidecar.dead_letters AS
    SELECT d.* FROM sidecar.pipelines AS p CROSS JOIN LATERAL sidecar.list_dead_letters(p.name) AS d;
