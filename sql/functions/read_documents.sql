-- Reads documents after their messages were leased, in a later transaction with a newer snapshot.
-- p_keys: canonical texts. A document above p_max_bytes is judged by its length, its text is not fetched. Texts beyond
-- p_budget bytes in sum are left for later (the first always comes).
-- Columns: key, verdict (embed, unchanged, gone, blank, too_large, later), content and content_hash (embed only),
-- content_bytes. Locks: none; an ACCESS EXCLUSIVE lock on the tables is waited for at most lock_timeout. May call: sidecar_runtime. Raises SC001, SC002, SC003.
CREATE OR REPLACE FUNCTION sidecar.read_documents(
    p_pipeline text, p_model_id text, p_keys text[], p_max_bytes bigint, p_budget bigint)
RETURNS TABLE (key text, verdict text, content text, content_hash text, content_bytes bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '500ms' AS $$
DECLARE
    p sidecar.pipelines := sidecar._workable(p_pipeline, p_model_id);
BEGIN
    RETURN QUERY EXECUTE format($q$
        WITH sized AS MATERIALIZED (
            SELECT k.n, k.key, s.%1$I IS NULL AS gone, octet_length(c.content)::bigint AS bytes,
                   CASE WHEN octet_length(c.content) <= $2 THEN c.content END AS content
            FROM unnest($1) WITH ORDINALITY AS k (key, n)
            LEFT JOIN %2$s AS s ON s.%1$I %3$s k.key::%4$s
            CROSS JOIN LATERAL (SELECT %5$s AS content) AS c
        ), judged AS (
            SELECT d.n, d.key, d.bytes, d.content, h.hash, CASE
                WHEN d.gone THEN 'gone'
                WHEN d.content IS NULL THEN 'too_large'
                WHEN sidecar._blank(d.content) THEN 'blank'
                WHEN EXISTS (SELECT FROM %6$s AS e WHERE e.%7$I %3$s d.key::%4$s AND e.chunk_no = 0
                             AND e.source_text_hash = h.hash AND e.model = $4) THEN 'unchanged'
                ELSE 'embed' END AS verdict
            FROM sized AS d CROSS JOIN LATERAL (SELECT md5(d.content) AS hash) AS h
        ), budgeted AS (
            SELECT j.*, sum(CASE WHEN j.verdict = 'embed' THEN j.bytes ELSE 0 END) OVER (ORDER BY j.n) - j.bytes AS before
            FROM judged AS j
        )
        SELECT b.key, v.verdict, CASE WHEN v.verdict = 'embed' THEN b.content END,
               CASE WHEN v.verdict IN ('embed', 'blank', 'unchanged') THEN b.hash END, b.bytes
        FROM budgeted AS b
        CROSS JOIN LATERAL (SELECT CASE WHEN b.verdict = 'embed' AND b.before >= $3 THEN 'later' ELSE b.verdict END
                            AS verdict) AS v
        ORDER BY b.n
    $q$, p.key_column, p.source, p.key_equals, p.key_type, sidecar._content(p, 's'), p.embeddings, p.embeddings_key)
    USING p_keys, p_max_bytes, p_budget, p_model_id;
END $$;
