-- The k nearest chunks of a pipeline by cosine similarity, best first.
-- Columns: key, chunk_no, similarity (1 - cosine distance, in [-1, 1]), source_text (what was embedded; the document's
-- rendered content where the pipeline stores no text).
-- Runs as the caller, joined with the source: its privileges and row level security hold.
-- Locks: none. May call: sidecar_runtime, sidecar_reader (each needs SELECT on both tables).
CREATE OR REPLACE FUNCTION sidecar.search(
    p_pipeline text, p_query @extschema:vector@.vector, p_k integer DEFAULT 10)
RETURNS TABLE (key text, chunk_no integer, similarity double precision, source_text text)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p sidecar.pipelines := sidecar._intact(p_pipeline);
BEGIN
    IF p_k NOT BETWEEN 1 AND 1000 THEN
        RAISE EXCEPTION USING ERRCODE = 'SC010', MESSAGE = format('k is %s; allowed are 1 to 1000', p_k);
    END IF;
    -- For this transaction only: look at enough candidates, and go on where rows are filtered away (pgvector 0.8).
    PERFORM set_config('hnsw.ef_search', greatest(40, p_k)::text, true);
    IF (SELECT string_to_array(split_part(e.extversion, '-', 1), '.')::integer[] >= ARRAY[0, 8]
        FROM pg_extension AS e WHERE e.extname = 'vector') THEN
        PERFORM set_config('hnsw.iterative_scan', 'strict_order', true);
    END IF;
    RETURN QUERY EXECUTE format($q$
        SELECT e.%1$I::text, e.chunk_no, 1 - (e.embedding OPERATOR(@extschema:vector@.<=>) $1),
               coalesce(e.source_text, %2$s)
        FROM %3$s AS e JOIN %4$s AS s ON s.%5$I %6$s e.%1$I
        ORDER BY e.embedding OPERATOR(@extschema:vector@.<=>) $1 LIMIT $2
    $q$, p.embeddings_key, sidecar._content(p, 's'), sidecar._table(p.name, p.embeddings), sidecar._table(p.name, p.source),
         p.key_column, p.key_equals)
    USING p_query, p_k;
END $$;
