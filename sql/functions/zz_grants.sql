-- Who may call what, and one text format for every session: hashes must not depend on a role's date style.
-- Runs last, at every migrate, as the owner of schema sidecar. Locks: catalogue rows of our functions.
DO $$
DECLARE
    v_function record;
    v_runtime text[] := ARRAY['lease', 'begin', 'extend', 'defer', 'acknowledge', 'read_documents', 'settle',
        'dead_letter', 'replay', 'purge', 'list_dead_letters', 'sweep', 'request_sweep', 'search', '_pipeline',
        '_intact', '_table', '_content', 'queue_depths', 'count_documents', 'list_status', 'list_pipelines',
        'register_model', 'set_enabled', 'schema_version', 'sweep_progress', 'observe', 'oldest_transaction', 'explain_document',
        'newest_dead_letters', 'list_indexes'];
    v_reader text[] := ARRAY['search', '_pipeline', '_intact', '_table', '_content', 'list_dead_letters', 'queue_depths',
        'count_documents', 'list_status', 'list_pipelines', 'schema_version', 'sweep_progress', 'observe',
        'oldest_transaction', 'newest_dead_letters', 'list_indexes'];
    v_renders text[] := ARRAY['read_documents', 'settle', 'dead_letter', 'list_dead_letters', 'sweep',
        'count_documents', 'lease', 'explain_document'];
BEGIN
    FOR v_function IN
        SELECT p.oid::regprocedure AS signature, p.proname AS name
        FROM pg_proc AS p JOIN pg_namespace AS n ON n.oid = p.pronamespace WHERE n.nspname = 'sidecar'
    LOOP
        EXECUTE format('REVOKE ALL ON FUNCTION %s FROM PUBLIC', v_function.signature);
        IF v_function.name = ANY (v_runtime) AND to_regrole('sidecar_runtime') IS NOT NULL THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO sidecar_runtime', v_function.signature);
        END IF;
        IF v_function.name = ANY (v_reader) AND to_regrole('sidecar_reader') IS NOT NULL THEN
            EXECUTE format('GRANT EXECUTE ON FUNCTION %s TO sidecar_reader', v_function.signature);
        END IF;
        IF v_function.name = ANY (v_renders) THEN
            EXECUTE format('ALTER FUNCTION %s SET datestyle = ''ISO, YMD''', v_function.signature);
            EXECUTE format('ALTER FUNCTION %s SET intervalstyle = ''postgres''', v_function.signature);
            EXECUTE format('ALTER FUNCTION %s SET timezone = ''UTC''', v_function.signature);
            EXECUTE format('ALTER FUNCTION %s SET extra_float_digits = 1', v_function.signature);
            EXECUTE format('ALTER FUNCTION %s SET bytea_output = ''hex''', v_function.signature);
        END IF;
    END LOOP;
    IF to_regrole('sidecar_runtime') IS NOT NULL THEN
        GRANT USAGE ON SCHEMA sidecar TO sidecar_runtime;
        GRANT SELECT ON sidecar.status, sidecar.dead_letters TO sidecar_runtime;
    END IF;
    IF to_regrole('sidecar_reader') IS NOT NULL THEN
        GRANT USAGE ON SCHEMA sidecar TO sidecar_reader;
        GRANT SELECT ON sidecar.status, sidecar.dead_letters TO sidecar_reader;
    END IF;
END $$;
