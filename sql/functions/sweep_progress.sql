-- What the current walk of a pipeline has found so far, by whichever replica; the last walk's totals when none is under
-- way. finished: no walk is under way or asked for.
-- Locks: none. May call: sidecar_runtime, sidecar_reader. Raises SC002.
CREATE OR REPLACE FUNCTION sidecar.sweep_progress(p_pipeline text)
RETURNS TABLE (finished boolean, scanned bigint, missing bigint, outdated bigint, wrong_model bigint, surplus bigint,
               enqueued bigint)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM sidecar._pipeline(p_pipeline);
    RETURN QUERY SELECT s.finished_at IS NOT NULL, s.scanned, s.missing, s.outdated, s.wrong_model, s.surplus, s.enqueued
        FROM sidecar.sweeps AS s WHERE s.pipeline = p_pipeline;
END $$;
