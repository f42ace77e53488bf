-- Attaching and detaching tables. Run as the caller, who owns the source (or may create triggers and foreign keys on
-- it) and is a member of the owner of schema sidecar.
-- Locks: SHARE ROW EXCLUSIVE on the source for some milliseconds, waited for at most 5 s; see each function.
-- May call: members of the owner of schema sidecar.

-- Raises SC010 with one line.
CREATE OR REPLACE FUNCTION sidecar._refuse(p_format text, VARIADIC p_values text[])
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RAISE EXCEPTION USING ERRCODE = 'SC010', MESSAGE = format(p_format, VARIADIC p_values);
END $$;

-- The key of a source: its single-column primary key, or the column named if it has a unique index and no nulls.
-- Columns: column_name, modified_type (with modifier), plain_type (without), equals, follows (operators).
-- Raises SC010 when there is none. Locks: none. May call: attach.
CREATE OR REPLACE FUNCTION sidecar._key_of(p_source regclass, p_key text)
RETURNS TABLE (column_name text, modified_type text, plain_type text, equals text, follows text)
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN QUERY
        SELECT a.attname::text, format_type(a.atttypid, a.atttypmod), format_type(a.atttypid, -1),
            max(format('OPERATOR(%I.%s)', n.nspname, o.oprname)) FILTER (WHERE m.amopstrategy = 3),
            max(format('OPERATOR(%I.%s)', n.nspname, o.oprname)) FILTER (WHERE m.amopstrategy = 5)
        FROM (SELECT x.indexrelid, x.indrelid, x.indkey[0] AS attnum, x.indclass[0] AS opclass FROM pg_index AS x
              WHERE x.indrelid = p_source AND x.indisunique AND x.indisvalid AND x.indimmediate AND x.indnkeyatts = 1
              AND x.indpred IS NULL AND x.indexprs IS NULL AND (p_key IS NOT NULL OR x.indisprimary)) AS i
        JOIN pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.attnum AND a.attnotnull
        JOIN pg_opclass AS c ON c.oid = i.opclass AND c.opcdefault  -- the sweep's ORDER BY is the type's own
        JOIN pg_amop AS m ON m.amopfamily = c.opcfamily AND m.amoplefttype = c.opcintype
            AND m.amoprighttype = c.opcintype AND m.amopstrategy IN (3, 5)
        JOIN pg_operator AS o ON o.oid = m.amopopr
        JOIN pg_namespace AS n ON n.oid = o.oprnamespace
        WHERE p_key IS NULL OR a.attname = p_key
        GROUP BY i.indexrelid, a.attname, a.atttypid, a.atttypmod
        LIMIT 1;
    IF NOT FOUND THEN
        IF p_key IS NULL THEN
            PERFORM sidecar._refuse('table %s has no primary key of one column; add one, or name a NOT NULL column '
                'with a unique index as the key', p_source::text);
        END IF;
        PERFORM sidecar._refuse('column %s of table %s is no key: it must exist, be NOT NULL and have a unique index '
            'of its own', quote_ident(p_key), p_source::text);
    END IF;
END $$;

-- Checks what can be checked before anything is made. Raises SC010. Locks: none. May call: attach.
CREATE OR REPLACE FUNCTION sidecar._check_source(p_source regclass, p_content text[])
RETURNS void
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_missing text;
    v_table pg_class;
BEGIN
    SELECT * INTO v_table FROM pg_class WHERE oid = p_source;
    IF v_table.relkind NOT IN ('r', 'p') OR v_table.relpersistence = 't' THEN
        PERFORM sidecar._refuse('%s is no permanent table; only those can be attached', p_source::text);
    END IF;
    IF v_table.relkind = 'r' AND EXISTS (SELECT FROM pg_inherits WHERE inhparent = p_source) THEN
        PERFORM sidecar._refuse('table %s has tables that inherit from it, whose rows no foreign key can name; attach '
            'each of them', p_source::text);
    END IF;
    IF coalesce(cardinality(p_content), 0) = 0 THEN
        PERFORM sidecar._refuse('no content column of table %s is named; name at least one', p_source::text);
    END IF;
    SELECT c INTO v_missing FROM unnest(p_content) AS c WHERE NOT EXISTS (
        SELECT FROM pg_attribute AS a WHERE a.attrelid = p_source AND a.attname = c AND a.attnum > 0
        AND NOT a.attisdropped);
    IF FOUND THEN
        PERFORM sidecar._refuse('table %s has no column %s; its columns: %s', p_source::text, quote_ident(v_missing),
            (SELECT string_agg(quote_ident(a.attname), ', ' ORDER BY a.attnum) FROM pg_attribute AS a
             WHERE a.attrelid = p_source AND a.attnum > 0 AND NOT a.attisdropped));
    END IF;
    SELECT a.attname INTO v_missing FROM pg_attribute AS a
    WHERE a.attrelid = p_source AND a.attname = ANY (p_content) AND a.attgenerated = 'v' LIMIT 1;
    IF FOUND THEN
        PERFORM sidecar._refuse('column %s of table %s is a virtual generated column, which triggers cannot see; make it '
            'STORED, or name the columns that it is made of', quote_ident(v_missing), p_source::text);
    END IF;
    IF v_table.relrowsecurity AND NOT (
        SELECT r.rolsuper OR r.rolbypassrls OR (r.oid = v_table.relowner AND NOT v_table.relforcerowsecurity)
        FROM pg_roles AS r WHERE r.rolname = sidecar._owner()) THEN
        PERFORM sidecar._refuse('table %s has row level security that would hide rows from role %s; as a superuser run: '
            'ALTER ROLE %s BYPASSRLS', p_source::text, quote_ident(sidecar._owner()), quote_ident(sidecar._owner()));
    END IF;
END $$;

-- Creates the table of vectors beside a source, with its foreign key, storage and index. Returns its name.
-- Locks: SHARE ROW EXCLUSIVE on the source (foreign key). May call: attach.
CREATE OR REPLACE FUNCTION sidecar._create_embeddings(
    p_source regclass, p_schema text, p_table text, p_key_column text, p_key_type text, p_embeddings_key text,
    p_dimensions integer, p_index boolean)
RETURNS regclass
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_name text := format('%I.%I', p_schema, p_table);
BEGIN
    IF to_regclass(v_name) IS NOT NULL THEN
        PERFORM sidecar._refuse('table %s exists already; name another table for the vectors, or drop it', v_name);
    END IF;
    EXECUTE format($q$
        CREATE TABLE %1$s (
            %2$I %3$s NOT NULL REFERENCES %4$s (%5$I) ON DELETE CASCADE ON UPDATE CASCADE,
            chunk_no integer NOT NULL DEFAULT 0 CHECK (chunk_no >= 0),
            source_text text,
            source_text_hash text NOT NULL,
            embedding @extschema:vector@.vector(%6$s) NOT NULL,
            model text NOT NULL,
            created_at timestamptz NOT NULL DEFAULT now(),
            updated_at timestamptz NOT NULL DEFAULT now(),
            PRIMARY KEY (%2$I, chunk_no))
    $q$, v_name, p_embeddings_key, p_key_type, p_source, p_key_column, p_dimensions);
    IF p_dimensions <= 1800 THEN  -- 4 bytes each: the row still fits its page, so the vector stays in line
        EXECUTE format('ALTER TABLE %s ALTER COLUMN embedding SET STORAGE PLAIN', v_name);
    END IF;
    IF p_index THEN
        EXECUTE format('CREATE INDEX ON %s USING hnsw (embedding @extschema:vector@.vector_cosine_ops)', v_name);
    END IF;
    -- It stays with whoever attaches, a member of our owner: a trigger of anybody else would run as our owner.
    EXECUTE format('GRANT SELECT ON %s TO %I', v_name,
        (SELECT r.rolname FROM pg_class AS c JOIN pg_roles AS r ON r.oid = c.relowner WHERE c.oid = p_source));
    EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO %I', v_name, sidecar._owner());
    RETURN v_name::regclass;
END $$;

-- Creates a pipeline's three queues, tuned for rows that live for seconds.
-- Locks: pgmq's queue locks. May call: attach.
CREATE OR REPLACE FUNCTION sidecar._create_queues(p_queue text)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_part text;
    v_table text;
BEGIN
    FOREACH v_part IN ARRAY ARRAY['live', 'bulk', 'dead'] LOOP
        v_table := sidecar._queue_table(p_queue, v_part);
        IF to_regclass(v_table) IS NOT NULL THEN
            PERFORM sidecar._refuse('queue %s exists already and belongs to no pipeline; name another queue, or drop it '
                'with pgmq.drop_queue', sidecar._queue_name(p_queue, v_part));
        END IF;
        PERFORM pgmq.create(sidecar._queue_name(p_queue, v_part));
        EXECUTE format('ALTER TABLE %s SET (fillfactor = 70, autovacuum_vacuum_scale_factor = 0, '
            'autovacuum_vacuum_threshold = 5000, autovacuum_vacuum_cost_delay = 0, '
            'autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 5000)', v_table);
        EXECUTE format('GRANT SELECT, INSERT, UPDATE, DELETE ON %s TO %I', v_table, sidecar._owner());
    END LOOP;
    EXECUTE format('CREATE INDEX ON %s ((message ->> ''document_id''))', sidecar._queue_table(p_queue, 'dead'));
END $$;

-- Changes what may change of an attached pipeline; raises SC010 for what may not. Asks for a sweep where vectors
-- change. Returns what changed, or null. Locks: the pipeline's row. May call: attach.
CREATE OR REPLACE FUNCTION sidecar._reattach(
    p sidecar.pipelines, p_source regclass, p_content text[], p_model text, p_model_id text, p_dimensions integer,
    p_long_documents text, p_store_text boolean)
RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_changes text;
BEGIN
    IF p.source <> p_source THEN
        PERFORM sidecar._refuse('pipeline %s is attached to %s already; give the pipeline for %s another name',
            p.name, p.source::text, p_source::text);
    END IF;
    IF NOT EXISTS (SELECT FROM pg_attribute AS a WHERE a.attrelid = p.source AND a.attname = p.key_column) THEN
        PERFORM sidecar._refuse('key column %s of pipeline %s is gone from table %s; detach the pipeline and attach it '
            'again', quote_ident(p.key_column), p.name, p_source::text);
    END IF;
    IF p.dimensions <> p_dimensions THEN
        PERFORM sidecar._refuse('pipeline %s has vectors of %s dimensions, model %s makes %s; detach it first, or give '
            'the new pipeline another name', p.name, p.dimensions::text, p_model, p_dimensions::text);
    END IF;
    v_changes := concat_ws(', ',
        CASE WHEN p.content_columns <> p_content THEN 'content columns' END,
        CASE WHEN p.model <> p_model OR p.model_id IS DISTINCT FROM coalesce(p_model_id, p.model_id) THEN 'model' END,
        CASE WHEN p.long_documents <> p_long_documents THEN 'long documents' END,
        CASE WHEN p.store_text <> p_store_text THEN 'stored text' END);
    IF v_changes = '' THEN
        RETURN NULL;
    END IF;
    UPDATE sidecar.pipelines SET
        content_columns = p_content, model = p_model, long_documents = p_long_documents, store_text = p_store_text,
        model_id = CASE WHEN p_model_id IS NOT NULL THEN p_model_id
            WHEN model = p_model AND long_documents = p_long_documents THEN model_id END,
        updated_at = now()
    WHERE name = p.name;
    PERFORM sidecar._generate_enqueue(p.name);
    PERFORM sidecar.request_sweep(p.name);
    PERFORM sidecar._forget_walk(p.name);
    PERFORM pg_notify('sidecar', 'catalog:' || p.name);
    RETURN v_changes;
END $$;

-- Keeps a vector beside every row of a table: checks it, creates the sidecar table, the queues and the triggers, and
-- asks for a backfill of what is there. Idempotent; on an attached pipeline it changes content, model and policy.
-- p_name names the pipeline (default: the table's name); p_key the key column (default: the primary key); p_embeddings
-- the table of vectors (default: <name>_embeddings beside the source); p_queue the queue (default: the name).
-- p_defer_index: whether the index on the vectors is left to be built after the load: auto (where the source is large,
-- see _is_large), always or never. Of an attached pipeline the index stays as it is: building and dropping it without
-- making writers wait is not possible in here.
-- Returns created, changed: <what>, or unchanged.
-- Locks: SHARE ROW EXCLUSIVE on the source for some milliseconds, waited for at most 5 s.
-- May call: members of the owner of schema sidecar.
CREATE OR REPLACE FUNCTION sidecar.attach(
    p_source regclass, p_content text[], p_name text DEFAULT NULL, p_key text DEFAULT NULL,
    p_embeddings text DEFAULT NULL, p_embeddings_key text DEFAULT NULL, p_queue text DEFAULT NULL,
    p_model text DEFAULT 'gte-small', p_model_id text DEFAULT NULL, p_dimensions integer DEFAULT 384,
    p_long_documents text DEFAULT 'mean', p_store_text boolean DEFAULT true, p_index boolean DEFAULT true,
    p_defer_index text DEFAULT 'auto')
RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    v_schema text;
    v_table text;
    v_name text;
    v_key record;
    v_embeddings regclass;
    v_index text;
    v_changes text;
    p sidecar.pipelines;
BEGIN
    SELECT n.nspname, c.relname INTO v_schema, v_table
    FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace WHERE c.oid = p_source;
    v_name := coalesce(p_name, regexp_replace(left(lower(v_table), 41), '[^a-z0-9_]', '_', 'g'));
    IF v_name !~ '^[a-z_][a-z0-9_]{0,40}$' THEN
        PERFORM sidecar._refuse('pipeline name %s is not allowed; it must match [a-z_][a-z0-9_]{0,40}', quote_literal(v_name));
    END IF;
    IF coalesce(p_queue, v_name) !~ '^[a-z_][a-z0-9_]{0,40}$' THEN
        PERFORM sidecar._refuse('queue name %s is not allowed; it must match [a-z_][a-z0-9_]{0,40}', quote_literal(p_queue));
    END IF;
    IF p_long_documents NOT IN ('mean', 'chunks', 'truncate') THEN
        PERFORM sidecar._refuse('long_documents is %s; allowed are mean, chunks, truncate', quote_literal(p_long_documents));
    END IF;
    IF p_defer_index NOT IN ('auto', 'always', 'never') THEN
        PERFORM sidecar._refuse('defer_index is %s; allowed are auto, always, never', quote_literal(p_defer_index));
    END IF;
    PERFORM sidecar._check_source(p_source, p_content);
    PERFORM pg_advisory_xact_lock(hashtextextended('attach' || chr(31) || v_name, 8088));

    SELECT * INTO p FROM sidecar.pipelines WHERE name = v_name;
    IF FOUND THEN
        SELECT l.state INTO v_index FROM sidecar.list_indexes() AS l WHERE l.pipeline = v_name;
        IF (p_defer_index, v_index) IN (('never', 'deferred'), ('always', 'live')) THEN
            PERFORM sidecar._refuse('the index of pipeline %s is %s already; change that with: sidecar-daemon index %s %s',
                v_name, v_index, CASE v_index WHEN 'live' THEN 'defer' ELSE 'build' END, v_name);
        END IF;
        v_changes := sidecar._reattach(p, p_source, p_content, p_model, p_model_id, p_dimensions, p_long_documents,
            p_store_text);
        RETURN coalesce('changed: ' || v_changes, 'unchanged');
    END IF;
    IF EXISTS (SELECT FROM sidecar.pipelines WHERE queue = coalesce(p_queue, v_name)) THEN
        PERFORM sidecar._refuse('queue %s belongs to another pipeline; name another queue', coalesce(p_queue, v_name));
    END IF;

    SELECT * INTO v_key FROM sidecar._key_of(p_source, p_key);
    IF sidecar._owner() <> current_user THEN
        EXECUTE format('GRANT USAGE ON SCHEMA %I TO %I', v_schema, sidecar._owner());
        EXECUTE format('GRANT SELECT ON %s TO %I', p_source, sidecar._owner());
    END IF;
    v_index := CASE
        WHEN NOT p_index OR p_dimensions > 2000 THEN 'none'  -- pgvector's limit for an HNSW index of type vector
        WHEN p_defer_index = 'always' OR p_defer_index = 'auto' AND sidecar._is_large(p_source) THEN 'deferred'
        ELSE 'live' END;
    v_embeddings := sidecar._create_embeddings(p_source, v_schema, coalesce(p_embeddings, v_name || '_embeddings'),
        v_key.column_name, v_key.modified_type, coalesce(p_embeddings_key, CASE WHEN v_key.column_name IN ('chunk_no',
        'source_text', 'source_text_hash', 'embedding', 'model', 'created_at', 'updated_at') THEN 'document_key'
        ELSE v_key.column_name END), p_dimensions, v_index = 'live');
    PERFORM sidecar._create_queues(coalesce(p_queue, v_name));
    INSERT INTO sidecar.pipelines (name, source, key_column, key_type, key_equals, key_follows, content_columns,
        embeddings, embeddings_key, queue, model, model_id, dimensions, long_documents, store_text, index_mode)
    SELECT v_name, p_source, v_key.column_name, v_key.plain_type, v_key.equals, v_key.follows, p_content, v_embeddings,
        a.attname, coalesce(p_queue, v_name), p_model, p_model_id, p_dimensions, p_long_documents, p_store_text, v_index
    FROM pg_attribute AS a WHERE a.attrelid = v_embeddings AND a.attnum = 1;
    PERFORM sidecar._generate_enqueue(v_name);
    EXECUTE format('CREATE TRIGGER %I AFTER INSERT ON %s REFERENCING NEW TABLE AS new_rows '
        'FOR EACH STATEMENT EXECUTE FUNCTION sidecar.%I()', 'sidecar_' || v_name || '_insert', p_source,
        'enqueue_' || v_name);
    EXECUTE format('CREATE TRIGGER %I AFTER UPDATE ON %s REFERENCING OLD TABLE AS old_rows NEW TABLE AS new_rows '
        'FOR EACH STATEMENT EXECUTE FUNCTION sidecar.%I()', 'sidecar_' || v_name || '_update', p_source,
        'enqueue_' || v_name);
    PERFORM sidecar.request_sweep(v_name);
    PERFORM pg_notify('sidecar', 'catalog:' || v_name);
    RETURN 'created';
END $$;

-- Undoes attach: triggers, queues (with dead letters), the pipeline, and the table of vectors unless it is kept.
-- Returns the name of the table of vectors. Locks: ACCESS EXCLUSIVE on the source (that is what dropping a trigger
-- takes) for some milliseconds and on what is dropped, each waited for at most 5 s; who comes meanwhile waits behind it.
-- Raises SC010 while the index is built or dropped: its lock on the vectors would be waited for with the source locked.
-- May call: members of the owner of schema sidecar.
CREATE OR REPLACE FUNCTION sidecar.detach(p_name text, p_keep_embeddings boolean DEFAULT false)
RETURNS text
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp SET lock_timeout = '5s' AS $$
DECLARE
    p sidecar.pipelines := sidecar._pipeline(p_name);
    v_part text;
    v_embeddings text := p.embeddings::text;
BEGIN
    IF NOT pg_try_advisory_xact_lock(sidecar._index_lock(p_name)) THEN
        PERFORM sidecar._refuse('the index of pipeline %1$s is being built or dropped: wait until that is over (see '
            'sidecar-daemon index show %1$s) or interrupt it, then detach again', p_name);
    END IF;
    -- The sweep's row first, as the sweep itself does: in the other order the two could deadlock.
    PERFORM FROM sidecar.sweeps WHERE pipeline = p_name FOR UPDATE;
    -- A source or a table of vectors that was dropped meanwhile leaves nothing to undo there.
    IF EXISTS (SELECT FROM pg_class WHERE oid = p.source) THEN
        EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s', 'sidecar_' || p.name || '_insert', p.source);
        EXECUTE format('DROP TRIGGER IF EXISTS %I ON %s', 'sidecar_' || p.name || '_update', p.source);
    END IF;
    EXECUTE format('DROP FUNCTION IF EXISTS sidecar.%I()', 'enqueue_' || p.name);
    FOREACH v_part IN ARRAY ARRAY['live', 'bulk', 'dead'] LOOP
        IF to_regclass(sidecar._queue_table(p.queue, v_part)) IS NOT NULL THEN
            PERFORM pgmq.drop_queue(sidecar._queue_name(p.queue, v_part));
        END IF;
    END LOOP;
    DELETE FROM sidecar.pipelines WHERE name = p_name;
    DELETE FROM sidecar.claims WHERE pipeline = p_name;
    IF NOT p_keep_embeddings AND EXISTS (SELECT FROM pg_class WHERE oid = p.embeddings) THEN
        EXECUTE format('DROP TABLE %s', v_embeddings);
    END IF;
    PERFORM pg_notify('sidecar', 'catalog:' || p_name);
    RETURN v_embeddings;
END $$;

-- The standard document table of a new project, where it does not exist. Returns whether it was created.
-- Locks: none on existing tables. May call: members of the owner of schema sidecar.
CREATE OR REPLACE FUNCTION sidecar.create_source_documents()
RETURNS boolean
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF to_regclass('public.source_documents') IS NOT NULL THEN
        RETURN false;
    END IF;
    CREATE TABLE public.source_documents (
        id uuid PRIMARY KEY DEFAULT gen_random_uuid(),
        content text NOT NULL,
        metadata jsonb NOT NULL DEFAULT '{}',
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now());
    CREATE INDEX source_documents_content_idx ON public.source_documents USING gin (to_tsvector('english', content));
    CREATE INDEX source_documents_metadata_idx ON public.source_documents USING gin (metadata jsonb_path_ops);
    RETURN true;
END $$;
