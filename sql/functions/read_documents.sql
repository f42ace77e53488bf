-- Holds every verdict unchanged against a settlement under way: a text that returns to an earlier value finds that value's
-- vector still there, while a settlement that looked before the return is about to commit the text between them. Who
-- acknowledged now would leave that one for ever. Where the document's lock is free, no settlement is between its look
-- and its commit, and a new statement sees what the last one wrote; where it is not, the document is claimed: it is
-- looked at again. Returns the verdicts.
-- Locks: advisory xact locks of these documents, tried, not waited for, after all else. May call: read_documents.
CREATE OR REPLACE FUNCTION sidecar._unchanged_for_good(
    p sidecar.pipelines, p_keys text[], p_verdicts text[], p_hashes text[])
RETURNS text[]
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_free text[] := ARRAY(
        SELECT d.key FROM unnest(p_keys, p_verdicts) AS d (key, verdict)
        WHERE d.verdict = 'unchanged' AND pg_try_advisory_xact_lock(sidecar._document_lock(p.name, d.key)));
    v_verdicts text[];
BEGIN
    EXECUTE format($q$
        SELECT array_agg(CASE
            WHEN d.verdict <> 'unchanged' THEN d.verdict
            WHEN d.key = ANY ($4) AND (SELECT e.source_text_hash = d.hash AND e.model = $5 FROM %1$s AS e
                                       WHERE e.%2$I %3$s d.key::%4$s AND e.chunk_no = 0) THEN 'unchanged'
            ELSE 'claimed' END ORDER BY d.n)
        FROM unnest($1, $2, $3) WITH ORDINALITY AS d (key, verdict, hash, n)
    $q$, sidecar._table(p.name, p.embeddings), p.embeddings_key, p.key_equals, p.key_type)
    INTO v_verdicts USING p_keys, p_verdicts, p_hashes, v_free, p.model_id;
    RETURN v_verdicts;
END $$;

-- Reads documents after their messages were leased, in a later transaction with a newer snapshot.
-- p_keys: canonical texts. A document above p_max_bytes is judged by its length, its text is not fetched. Texts beyond
-- p_budget bytes in sum are left for later (the first always comes).
-- p_claimant: a worker that will embed what it gets; it takes a claim on each for p_seconds, and documents that another
-- worker has claimed are claimed. Without one nothing is claimed and nobody's claim counts.
-- Rows, vectors and claims are looked up by key, one at a time (OFFSET 0, scalar subqueries): no belief of the planner can
-- turn that into a walk over the whole table (see claims).
-- Columns: key, verdict (embed, claimed, unchanged, gone, blank, too_large, later), content (embed only), content_hash
-- (not of gone, too_large and later), content_bytes. Locks: row locks on the claims taken, then the locks of what is
-- unchanged (tried); an ACCESS EXCLUSIVE lock on
-- the tables is waited for at most lock_timeout. May call: sidecar_runtime. Raises SC001, SC002, SC003.
CREATE OR REPLACE FUNCTION sidecar.read_documents(
    p_pipeline text, p_model_id text, p_keys text[], p_max_bytes bigint, p_budget bigint,
    p_claimant text DEFAULT NULL, p_seconds double precision DEFAULT NULL)
RETURNS TABLE (key text, verdict text, content text, content_hash text, content_bytes bigint)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET lock_timeout = '500ms' AS $$
DECLARE
    p sidecar.pipelines := sidecar._workable(p_pipeline, p_model_id);
    v_keys text[];
    v_verdicts text[];
    v_contents text[];
    v_hashes text[];
    v_bytes bigint[];
BEGIN
    EXECUTE format($q$
        WITH sized AS MATERIALIZED (
            SELECT k.n, k.key, c.content IS NULL AS gone, octet_length(c.content)::bigint AS bytes,
                   CASE WHEN octet_length(c.content) <= $2 THEN c.content END AS content
            FROM unnest($1) WITH ORDINALITY AS k (key, n)
            LEFT JOIN LATERAL (SELECT %5$s AS content FROM %2$s AS s WHERE s.%1$I %3$s k.key::%4$s OFFSET 0) AS c ON true
        ), judged AS (
            SELECT d.n, d.key, d.bytes, d.content, h.hash, CASE
                WHEN d.gone THEN 'gone'
                WHEN d.content IS NULL THEN 'too_large'
                WHEN sidecar._blank(d.content) THEN 'blank'
                WHEN (SELECT e.source_text_hash = h.hash AND e.model = $4 FROM %6$s AS e
                      WHERE e.%7$I %3$s d.key::%4$s AND e.chunk_no = 0) THEN 'unchanged'
                WHEN (SELECT c.hash = h.hash AND c.model = $4 AND c.claimant <> $6 AND c.expires_at > clock_timestamp()
                      FROM sidecar.claims AS c WHERE c.pipeline = $5 AND c.key = d.key) THEN 'claimed'
                ELSE 'embed' END AS verdict
            FROM sized AS d CROSS JOIN LATERAL (SELECT md5(d.content) AS hash) AS h
        ), budgeted AS (
            SELECT j.*, sum(CASE WHEN j.verdict = 'embed' THEN j.bytes ELSE 0 END) OVER (ORDER BY j.n) - j.bytes AS before
            FROM judged AS j
        ), answered AS (
            SELECT b.key, v.verdict, CASE WHEN v.verdict = 'embed' THEN b.content END AS content,
                   CASE WHEN v.verdict IN ('embed', 'claimed', 'blank', 'unchanged') THEN b.hash END AS hash, b.bytes
            FROM budgeted AS b
            CROSS JOIN LATERAL (SELECT CASE WHEN b.verdict = 'embed' AND b.before >= $3 THEN 'later' ELSE b.verdict END
                                AS verdict) AS v
            ORDER BY b.n
        )
        SELECT array_agg(a.key), array_agg(a.verdict), array_agg(a.content), array_agg(a.hash), array_agg(a.bytes)
        FROM answered AS a
    $q$, p.key_column, sidecar._table(p.name, p.source), p.key_equals, p.key_type, sidecar._content(p, 's'),
         sidecar._table(p.name, p.embeddings), p.embeddings_key)
    INTO v_keys, v_verdicts, v_contents, v_hashes, v_bytes
    USING p_keys, p_max_bytes, p_budget, p_model_id, p_pipeline, p_claimant;
    IF p_claimant IS NOT NULL AND 'embed' = ANY (v_verdicts) THEN
        v_verdicts := sidecar._claim(p, p_claimant, p_seconds, v_keys, v_verdicts, v_hashes);
    END IF;
    IF 'unchanged' = ANY (v_verdicts) THEN
        v_verdicts := sidecar._unchanged_for_good(p, v_keys, v_verdicts, v_hashes);
    END IF;
    RETURN QUERY
        SELECT d.key, d.verdict, CASE WHEN d.verdict = 'embed' THEN d.content END, d.hash, d.bytes
        FROM unnest(v_keys, v_verdicts, v_contents, v_hashes, v_bytes) AS d (key, verdict, content, hash, bytes);
END $$;
