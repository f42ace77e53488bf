-- The pipelines that exist, their model ids, pausing and resuming, the schema's version.

-- All pipelines by name. Locks: none. May call: sidecar_runtime, sidecar_reader.
CREATE OR REPLACE FUNCTION sidecar.list_pipelines()
RETURNS TABLE (name text, source text, embeddings text, queue text, model text, model_id text, dimensions integer,
               long_documents text, enabled boolean)
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT p.name, p.source::text, p.embeddings::text, p.queue, p.model, p.model_id, p.dimensions, p.long_documents,
           p.enabled
    FROM sidecar.pipelines AS p ORDER BY p.name
$$;

-- Writes a model id where the pipeline has none yet. Raises SC001 where it has another one, or the model itself was
-- switched meanwhile. A walk that ran while the id was unknown could not tell another model's vectors: the walk starts
-- again. Locks: the rows of the pipeline and of its sweep. May call: sidecar_runtime.
CREATE OR REPLACE FUNCTION sidecar.register_model(p_pipeline text, p_model text, p_model_id text)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE sidecar.pipelines SET model_id = p_model_id, updated_at = now()
    WHERE name = p_pipeline AND model_id IS NULL AND model = p_model;
    IF FOUND THEN
        PERFORM sidecar.request_sweep(p_pipeline);
        PERFORM sidecar._forget_walk(p_pipeline);
    END IF;
    IF (sidecar._pipeline(p_pipeline)).model_id IS DISTINCT FROM p_model_id THEN
        RAISE EXCEPTION USING ERRCODE = 'SC001', MESSAGE = format(
            'pipeline %s needs model %s, this replica has %s; run attach again to switch the pipeline, or upgrade this '
            'replica', p_pipeline, coalesce((sidecar._pipeline(p_pipeline)).model_id, (sidecar._pipeline(p_pipeline)).model),
            p_model_id);
    END IF;
END $$;

-- Stops and restarts leasing in every replica; survives restarts. Returns whether anything changed.
-- Locks: the pipeline's row. May call: sidecar_runtime.
CREATE OR REPLACE FUNCTION sidecar.set_enabled(p_pipeline text, p_enabled boolean)
RETURNS boolean
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_changed boolean;
BEGIN
    PERFORM sidecar._pipeline(p_pipeline);
    UPDATE sidecar.pipelines SET enabled = p_enabled, updated_at = now()
    WHERE name = p_pipeline AND enabled <> p_enabled;
    v_changed := FOUND;
    PERFORM pg_notify('sidecar', 'catalog:' || p_pipeline);
    RETURN v_changed;
END $$;

-- The number of the newest migration. Locks: none. May call: sidecar_runtime, sidecar_reader.
CREATE OR REPLACE FUNCTION sidecar.schema_version()
RETURNS integer
LANGUAGE sql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
    SELECT coalesce(max(version), 0) FROM sidecar.schema_migrations
$$;
