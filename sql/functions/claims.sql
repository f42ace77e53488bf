-- Claims: who embeds which text of a document now. A hint: whoever loses one embeds a text twice, nothing else.
-- Always locked in the order of the keys, after any message: two replicas never deadlock over them.
-- May call: the functions of this schema.

-- Takes the claims of the documents whose verdict is embed, and returns the verdicts that follow: embed where the claim
-- is ours, claimed where another replica's stands, unchanged where the vector was written between the verdict and the
-- claim. A claim is taken over when it has another text or model, or has expired.
-- Locks: row locks on the claims taken; waited for at most the caller's lock_timeout, then none is taken.
CREATE OR REPLACE FUNCTION sidecar._claim(
    p sidecar.pipelines, p_claimant text, p_seconds double precision,
    p_keys text[], p_verdicts text[], p_hashes text[])
RETURNS text[]
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_taken text[] := '{}';
    v_written text[] := '{}';
BEGIN
    BEGIN
        WITH taken AS (
            INSERT INTO sidecar.claims AS c (pipeline, key, hash, model, claimant, expires_at)
            SELECT DISTINCT ON (d.key) p.name, d.key, d.hash, p.model_id, p_claimant,
                   clock_timestamp() + make_interval(secs => p_seconds)
            FROM unnest(p_keys, p_verdicts, p_hashes) AS d (key, verdict, hash)
            WHERE d.verdict = 'embed' ORDER BY d.key
            ON CONFLICT (pipeline, key) DO UPDATE SET
                hash = excluded.hash, model = excluded.model, claimant = excluded.claimant,
                expires_at = excluded.expires_at
            WHERE c.claimant = excluded.claimant OR c.hash <> excluded.hash OR c.model <> excluded.model
               OR c.expires_at <= clock_timestamp()
            RETURNING c.key
        )
        SELECT coalesce(array_agg(t.key), '{}') INTO v_taken FROM taken AS t;
    EXCEPTION WHEN lock_not_available THEN
        v_taken := '{}';  -- another replica reads one of them this moment, and is slow to take its texts
    END;
    IF v_taken <> '{}' THEN
        -- A new statement with a newer snapshot: a settlement frees its claim and writes its vector at one moment.
        EXECUTE format($q$
            SELECT coalesce(array_agg(d.key), '{}') FROM unnest($1, $2) AS d (key, hash)
            WHERE d.key = ANY ($3) AND (SELECT e.source_text_hash = d.hash AND e.model = $4 FROM %1$s AS e
                                        WHERE e.%2$I %3$s d.key::%4$s AND e.chunk_no = 0)
        $q$, sidecar._table(p.name, p.embeddings), p.embeddings_key, p.key_equals, p.key_type)
        INTO v_written USING p_keys, p_hashes, v_taken, p.model_id;
    END IF;
    IF v_written <> '{}' THEN
        PERFORM sidecar._free_claims(p.name, v_written, p_claimant);
    END IF;
    RETURN (SELECT array_agg(CASE WHEN d.verdict <> 'embed' THEN d.verdict
                                  WHEN d.key = ANY (v_written) THEN 'unchanged'
                                  WHEN d.key = ANY (v_taken) THEN 'embed' ELSE 'claimed' END ORDER BY d.n)
            FROM unnest(p_keys, p_verdicts) WITH ORDINALITY AS d (key, verdict, n));
END $$;

-- The statements below name their keys as an array beside all else, and read no table from end to end: what they touch is
-- then bounded by these keys, whatever the planner believes of a table that is filled and emptied all day. Its beliefs
-- are of the last ANALYZE, and between two of them a plan for "two claims" once read 60,000 dead ones, 64 times over.

-- Frees a worker's own claims on documents that it gives up; what has expired there goes too, so that nothing stays of
-- a crashed replica. Nothing happens without a claimant. Locks: row locks on the claims.
CREATE OR REPLACE FUNCTION sidecar._free_claims(p_pipeline text, p_keys text[], p_claimant text)
RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
    SELECT FROM sidecar.claims AS c
    WHERE c.pipeline = p_pipeline AND c.key = ANY (p_keys)
      AND (c.claimant = p_claimant OR p_claimant IS NOT NULL AND c.expires_at <= clock_timestamp())
    ORDER BY c.key FOR UPDATE;
    DELETE FROM sidecar.claims AS c
    WHERE c.pipeline = p_pipeline AND c.key = ANY (p_keys)
      AND (c.claimant = p_claimant OR p_claimant IS NOT NULL AND c.expires_at <= clock_timestamp())
$$;

-- Frees the claims on texts that were answered, whoever holds them: there is nothing left to embed.
-- Locks: row locks on the claims.
CREATE OR REPLACE FUNCTION sidecar._answer_claims(p_pipeline text, p_keys text[], p_hashes text[])
RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
    SELECT FROM sidecar.claims AS c
    WHERE c.pipeline = p_pipeline AND c.key = ANY (p_keys)
      AND (c.key, c.hash) IN (SELECT d.key, d.hash FROM unnest(p_keys, p_hashes) AS d (key, hash))
    ORDER BY c.key FOR UPDATE;
    DELETE FROM sidecar.claims AS c
    WHERE c.pipeline = p_pipeline AND c.key = ANY (p_keys)
      AND (c.key, c.hash) IN (SELECT d.key, d.hash FROM unnest(p_keys, p_hashes) AS d (key, hash))
$$;

-- Holds a worker's own claims for p_seconds from now, as its leases. Locks: row locks on the claims.
CREATE OR REPLACE FUNCTION sidecar._extend_claims(
    p_pipeline text, p_keys text[], p_claimant text, p_seconds double precision)
RETURNS void
LANGUAGE sql SET search_path = pg_catalog, pg_temp SET enable_seqscan = off AS $$
    SELECT FROM sidecar.claims AS c
    WHERE c.pipeline = p_pipeline AND c.key = ANY (p_keys) AND c.claimant = p_claimant
    ORDER BY c.key FOR UPDATE;
    UPDATE sidecar.claims AS c SET expires_at = clock_timestamp() + make_interval(secs => p_seconds)
    WHERE c.pipeline = p_pipeline AND c.key = ANY (p_keys) AND c.claimant = p_claimant
$$;
