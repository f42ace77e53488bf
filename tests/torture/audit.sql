-- What the torture sees of a database: every version of every document, every write to a sidecar table, every step of
-- every message. Owned by the superuser; the daemon's role neither sees nor needs it.

CREATE SCHEMA audit;

CREATE TABLE audit.versions (
    seq bigint GENERATED ALWAYS AS IDENTITY, at timestamptz NOT NULL DEFAULT clock_timestamp(),
    txid xid8 NOT NULL DEFAULT pg_current_xact_id(), op text NOT NULL, key text NOT NULL, hash text);

CREATE TABLE audit.writes (
    seq bigint GENERATED ALWAYS AS IDENTITY, at timestamptz NOT NULL DEFAULT clock_timestamp(),
    txid xid8 NOT NULL DEFAULT pg_current_xact_id(), op text NOT NULL, pipeline text NOT NULL, key text NOT NULL,
    chunk_no integer NOT NULL, hash text NOT NULL, model text NOT NULL);

CREATE TABLE audit.messages (
    seq bigint GENERATED ALWAYS AS IDENTITY, at timestamptz NOT NULL DEFAULT clock_timestamp(),
    txid xid8 NOT NULL DEFAULT pg_current_xact_id(), op text NOT NULL, queue text NOT NULL, msg_id bigint NOT NULL,
    read_ct integer NOT NULL, key text);

CREATE FUNCTION audit.version() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO audit.versions (op, key, hash)
    VALUES (TG_OP, coalesce(new.id, old.id)::text, CASE WHEN TG_OP <> 'DELETE' THEN md5(new.content) END);
    RETURN NULL;
END $$;

CREATE FUNCTION audit.write() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
DECLARE
    r record := coalesce(new, old);
BEGIN
    INSERT INTO audit.writes (op, pipeline, key, chunk_no, hash, model)
    VALUES (TG_OP, TG_ARGV[0], r.id::text, r.chunk_no, r.source_text_hash, r.model);
    RETURN NULL;
END $$;

CREATE FUNCTION audit.message() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    INSERT INTO audit.messages (op, queue, msg_id, read_ct, key)
    SELECT TG_OP, TG_TABLE_NAME, r.msg_id, r.read_ct, r.message ->> 'document_id' FROM rows AS r;
    RETURN NULL;
END $$;

-- Installs the triggers of the source and of one pipeline. Called once for each pipeline, after attach.
CREATE FUNCTION audit.watch(p_pipeline text) RETURNS void LANGUAGE plpgsql AS $$
DECLARE
    p sidecar.pipelines;
    v_queue text;
BEGIN
    SELECT * INTO STRICT p FROM sidecar.pipelines WHERE name = p_pipeline;
    EXECUTE format('CREATE OR REPLACE TRIGGER audit_version AFTER INSERT OR UPDATE OR DELETE ON %s '
        'FOR EACH ROW EXECUTE FUNCTION audit.version()', p.source);
    EXECUTE format('CREATE TRIGGER audit_write AFTER INSERT OR UPDATE OR DELETE ON %s '
        'FOR EACH ROW EXECUTE FUNCTION audit.write(%L)', p.embeddings, p.name);
    FOREACH v_queue IN ARRAY ARRAY[p.queue, p.queue || '_bulk', p.queue || '_dlq'] LOOP
        EXECUTE format('CREATE TRIGGER audit_insert AFTER INSERT ON pgmq.%I REFERENCING NEW TABLE AS rows '
            'FOR EACH STATEMENT EXECUTE FUNCTION audit.message()', 'q_' || v_queue);
        EXECUTE format('CREATE TRIGGER audit_update AFTER UPDATE ON pgmq.%I REFERENCING NEW TABLE AS rows '
            'FOR EACH STATEMENT EXECUTE FUNCTION audit.message()', 'q_' || v_queue);
        EXECUTE format('CREATE TRIGGER audit_delete AFTER DELETE ON pgmq.%I REFERENCING OLD TABLE AS rows '
            'FOR EACH STATEMENT EXECUTE FUNCTION audit.message()', 'q_' || v_queue);
    END LOOP;
END $$;
