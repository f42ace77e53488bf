-- Makes documents true, in one transaction: locks the keys, re-reads their hashes in a new statement, writes exactly
-- the chunks given (none for a blank document), acknowledges under the fence, and frees the claims on these texts.
-- Documents: p_keys, p_hashes (md5 of the rendered content that was embedded). Chunks: p_chunk_docs (1-based index into
-- p_keys), p_chunk_nos, p_chunk_texts, p_vectors. Messages: p_msg_docs (index), p_msg_lanes, p_msg_ids, p_read_cts.
-- Columns: document (index), outcome (embedded, blank, superseded, gone), acknowledged, freshness_seconds (enqueue of
-- the oldest acknowledged message to now; null if none was ours).
-- Why not one INSERT ... WHERE hash = ... ON CONFLICT: its guard would use the statement's snapshot; blocked behind a
-- newer writer it would then overwrite the newer vector.
-- Each statement is bound to these keys and messages, whatever the planner believes of the tables (see claims).
-- Locks: advisory xact lock per document, KEY SHARE on source rows (foreign key), row locks on vectors, messages and claims.
-- A writer's open DELETE is waited for at most lock_timeout. May call: sidecar_runtime.
-- Raises SC001, SC002; 23503 when a document is deleted under the settlement (settle it again: it is gone).
CREATE OR REPLACE FUNCTION sidecar.settle(
    p_pipeline text, p_model_id text, p_keys text[], p_hashes text[],
    p_chunk_docs integer[], p_chunk_nos integer[], p_chunk_texts text[], p_vectors @extschema:vector@.vector[],
    p_msg_docs integer[], p_msg_lanes text[], p_msg_ids bigint[], p_read_cts integer[])
RETURNS TABLE (document integer, outcome text, acknowledged integer, freshness_seconds double precision)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '500ms' AS $$
DECLARE
    p sidecar.pipelines;
    v_outcomes text[];
BEGIN
    PERFORM sidecar._lock_documents(p_pipeline, p_keys);
    p := sidecar._intact(p_pipeline);  -- after the wait: the model may have been switched meanwhile
    IF p.model_id IS DISTINCT FROM p_model_id THEN
        RAISE EXCEPTION USING ERRCODE = 'SC001', MESSAGE = format(
            'pipeline %s needs model %s, these vectors are of %s', p_pipeline, coalesce(p.model_id, 'unset'), p_model_id);
    END IF;

    EXECUTE format($q$
        SELECT array_agg(CASE
            WHEN s.hash IS NULL THEN 'gone'
            WHEN s.hash <> d.hash THEN 'superseded'
            WHEN d.n = ANY ($3) THEN 'embedded'
            ELSE 'blank' END ORDER BY d.n)
        FROM unnest($1, $2) WITH ORDINALITY AS d (key, hash, n)
        LEFT JOIN LATERAL (SELECT md5(%2$s) AS hash FROM %3$s AS s WHERE s.%1$I %4$s d.key::%5$s OFFSET 0) AS s ON true
    $q$, p.key_column, sidecar._content(p, 's'), sidecar._table(p.name, p.source), p.key_equals, p.key_type)
    INTO v_outcomes USING p_keys, p_hashes, p_chunk_docs;

    EXECUTE format($q$
        DELETE FROM %1$s AS e
        USING (SELECT d.key::%3$s AS key, count(c.document) AS chunks
               FROM unnest($1, $2) WITH ORDINALITY AS d (key, outcome, n)
               LEFT JOIN unnest($3) AS c (document) ON c.document = d.n
               WHERE d.outcome IN ('embedded', 'blank') GROUP BY 1) AS k
        WHERE e.%2$I %4$s ANY ($1::%3$s[]) AND e.%2$I %4$s k.key AND e.chunk_no >= k.chunks
    $q$, sidecar._table(p.name, p.embeddings), p.embeddings_key, p.key_type, p.key_equals)
    USING p_keys, v_outcomes, p_chunk_docs;

    -- DISTINCT: two texts may name one key (1.0 and 1.00), and a statement may not write a row twice.
    EXECUTE format($q$
        INSERT INTO %1$s AS e (%2$I, chunk_no, source_text, source_text_hash, embedding, model)
        SELECT DISTINCT ON (1, 2) ($1)[c.document]::%3$s, c.chunk_no, CASE WHEN $7 THEN c.source_text END, ($2)[c.document], c.embedding, $8
        FROM unnest($3, $4, $5, $6) AS c (document, chunk_no, source_text, embedding)
        WHERE ($9)[c.document] = 'embedded'
        ORDER BY 1, 2
        ON CONFLICT (%2$I, chunk_no) DO UPDATE SET
            source_text = excluded.source_text, source_text_hash = excluded.source_text_hash,
            embedding = excluded.embedding, model = excluded.model, updated_at = now()
    $q$, sidecar._table(p.name, p.embeddings), p.embeddings_key, p.key_type)
    USING p_keys, p_hashes, p_chunk_docs, p_chunk_nos, p_chunk_texts, p_vectors, p.store_text, p_model_id, v_outcomes;

    RETURN QUERY EXECUTE format($q$
        WITH fence AS (SELECT * FROM unnest($1, $2, $3, $4) AS f (document, lane, msg_id, read_ct)),
        live AS (DELETE FROM %1$s AS q USING fence AS f
                 WHERE f.lane = 'live' AND q.msg_id = ANY ($3) AND q.msg_id = f.msg_id AND q.read_ct = f.read_ct
                 RETURNING f.document, q.enqueued_at),
        bulk AS (DELETE FROM %2$s AS q USING fence AS f
                 WHERE f.lane = 'bulk' AND q.msg_id = ANY ($3) AND q.msg_id = f.msg_id AND q.read_ct = f.read_ct
                 RETURNING f.document, q.enqueued_at),
        gone AS (SELECT * FROM live UNION ALL SELECT * FROM bulk)
        SELECT d.n::integer, d.outcome, count(g.document)::integer,
               extract(epoch FROM clock_timestamp() - min(g.enqueued_at))::double precision
        FROM unnest($5) WITH ORDINALITY AS d (outcome, n)
        LEFT JOIN gone AS g ON g.document = d.n
        GROUP BY d.n, d.outcome ORDER BY d.n
    $q$, sidecar._queue_table(p.queue, 'live'), sidecar._queue_table(p.queue, 'bulk'))
    USING p_msg_docs, p_msg_lanes, p_msg_ids, p_read_cts, v_outcomes;
    PERFORM sidecar._answer_claims(p_pipeline, p_keys, p_hashes);
END $$;
