-- Internal building blocks: look-ups, expressions, keys, locks.
-- Locks: none, except _lock_documents, which takes transaction-level advisory locks.
-- May call: nobody directly; they are called by the functions of this schema.
-- Those that are asked once a row are bound when they are created (RETURN) and set nothing: only such are put in line by
-- the planner; a call of one that sets its search_path costs microseconds, for every row of every statement.

-- The pipeline's row. Raises SC002 when there is none.
CREATE OR REPLACE FUNCTION sidecar._pipeline(p_name text)
RETURNS sidecar.pipelines
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p sidecar.pipelines;
BEGIN
    SELECT * INTO p FROM sidecar.pipelines WHERE name = p_name;
    IF NOT FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'SC002', MESSAGE = format(
            'pipeline %L does not exist; known pipelines: %s', p_name,
            coalesce((SELECT string_agg(name, ', ' ORDER BY name) FROM sidecar.pipelines), 'none'));
    END IF;
    RETURN p;
END $$;

-- The pipeline's row for whoever reads its tables. Raises SC002, and 42P01 when the source or the table of vectors was
-- dropped: its name would be a bare number in a statement, and a broken statement is nobody's outage.
CREATE OR REPLACE FUNCTION sidecar._intact(p_name text)
RETURNS sidecar.pipelines
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p sidecar.pipelines := sidecar._pipeline(p_name);
    v_dropped text;
BEGIN
    SELECT what INTO v_dropped FROM (VALUES ('source', p.source), ('table of vectors', p.embeddings)) AS t (what, id)
    WHERE NOT EXISTS (SELECT FROM pg_class AS c WHERE c.oid = t.id) LIMIT 1;
    IF FOUND THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_table', MESSAGE = format(
            'the %s of pipeline %s was dropped: detach the pipeline', v_dropped, p_name);
    END IF;
    RETURN p;
END $$;

-- The name of a pipeline's table for a statement that is about to be made. Raises 42P01 where the table was dropped since
-- _intact looked, as when detach was waited for: its name is a bare number then, which no table's own name can be.
CREATE OR REPLACE FUNCTION sidecar._table(p_pipeline text, p_table regclass)
RETURNS text
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    IF p_table::text ~ '^[0-9]+$' THEN
        RAISE EXCEPTION USING ERRCODE = 'undefined_table', MESSAGE = format(
            'a table of pipeline %s was dropped meanwhile', p_pipeline);
    END IF;
    RETURN p_table::text;
END $$;

-- The pipeline's row for a worker: raises SC002 unknown, SC003 paused, SC001 when it has another model id.
CREATE OR REPLACE FUNCTION sidecar._workable(p_name text, p_model_id text)
RETURNS sidecar.pipelines
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p sidecar.pipelines := sidecar._intact(p_name);
BEGIN
    IF NOT p.enabled THEN
        RAISE EXCEPTION USING ERRCODE = 'SC003', MESSAGE = format('pipeline %s is paused', p_name);
    END IF;
    IF p.model_id IS DISTINCT FROM p_model_id THEN
        RAISE EXCEPTION USING ERRCODE = 'SC001', MESSAGE = format(
            'pipeline %s needs model %s, this replica has %s', p_name, coalesce(p.model_id, 'unset'), p_model_id);
    END IF;
    RETURN p;
END $$;

-- SQL expression of the rendered content of a row alias: one column as text, several joined by blank lines, never null.
CREATE OR REPLACE FUNCTION sidecar._content(p sidecar.pipelines, p_alias text)
RETURNS text
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT CASE cardinality(p.content_columns)
        WHEN 1 THEN format(CASE WHEN EXISTS (
                SELECT FROM pg_attribute AS a WHERE a.attrelid = p.source AND a.attname = p.content_columns[1]
                AND a.atttypid IN ('text'::regtype, 'varchar'::regtype))
            THEN 'coalesce(%s.%I::text, '''')' ELSE 'concat(%s.%I)' END, p_alias, p.content_columns[1])
        ELSE format('concat_ws(E''\n\n'', %s)',
            (SELECT string_agg(format('%s.%I', p_alias, c), ', ' ORDER BY n)
             FROM unnest(p.content_columns) WITH ORDINALITY AS u (c, n)))
    END
$$;

-- ASCII and Unicode white space.
CREATE OR REPLACE FUNCTION sidecar._spaces()
RETURNS text
LANGUAGE sql IMMUTABLE
    RETURN E' \t\n\r\f\u000B\u0085\u00A0\u2000\u2001\u2002\u2003\u2004\u2005\u2006\u2007\u2008\u2009\u200A\u2028\u2029\u202F\u205F\u3000\uFEFF';

-- Whether a rendered content has nothing to embed: white space only. Its beginning mostly tells; to trim 100 MB takes
-- 1.6 s, and beyond 128 MiB trimming is refused: what is that long is never blank.
CREATE OR REPLACE FUNCTION sidecar._blank(p_content text)
RETURNS boolean
LANGUAGE sql IMMUTABLE
    RETURN CASE WHEN btrim(left(p_content, 1000), sidecar._spaces()) <> '' THEN false
        WHEN btrim(left(p_content, 1000000), sidecar._spaces()) <> '' OR octet_length(p_content) > 100000000 THEN false
        ELSE btrim(p_content, sidecar._spaces()) = '' END;

-- A bookkeeping count kept in a message; foreign shapes count 0.
CREATE OR REPLACE FUNCTION sidecar._count(p_message jsonb, p_field text)
RETURNS integer
LANGUAGE sql IMMUTABLE
    RETURN CASE WHEN p_message #>> ARRAY['sidecar', p_field] ~ '^[0-9]{1,6}$'
        THEN (p_message #>> ARRAY['sidecar', p_field])::integer ELSE 0 END;

-- A message with bookkeeping fields set; everything else is kept. A foreign shape that has no room for them stays as
-- it is: it becomes a dead letter as it came.
CREATE OR REPLACE FUNCTION sidecar._noted(p_message jsonb, p_fields jsonb)
RETURNS jsonb
LANGUAGE sql IMMUTABLE
    RETURN CASE WHEN jsonb_typeof(p_message) = 'object' THEN p_message || jsonb_build_object('sidecar',
            CASE WHEN jsonb_typeof(p_message -> 'sidecar') = 'object' THEN p_message -> 'sidecar' ELSE '{}'::jsonb END
            || p_fields)
        ELSE p_message END;

-- The document key that a message names, raw; null for a foreign shape.
CREATE OR REPLACE FUNCTION sidecar._named_key(p_message jsonb)
RETURNS text
LANGUAGE sql IMMUTABLE
    RETURN CASE WHEN jsonb_typeof(p_message -> 'document_id') IN ('string', 'number')
        THEN p_message ->> 'document_id' END;

-- Keys in the canonical text of the key's type; null where a text is no value of that type.
CREATE OR REPLACE FUNCTION sidecar._canonical_keys(p_type text, p_keys text[])
RETURNS text[]
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_canonical text[];
    v_one text;
BEGIN
    BEGIN  -- all at once: one sub-transaction for the lease, not one a message
        EXECUTE format('SELECT array_agg(k::%s::text ORDER BY n) FROM unnest($1) WITH ORDINALITY AS u (k, n)', p_type)
        INTO v_canonical USING p_keys;
        RETURN v_canonical;
    EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN
        v_canonical := '{}';
    END;
    FOR i IN 1 .. cardinality(p_keys) LOOP
        BEGIN
            EXECUTE format('SELECT $1::%s::text', p_type) INTO v_one USING p_keys[i];
        EXCEPTION WHEN data_exception OR integrity_constraint_violation THEN
            v_one := NULL;
        END;
        v_canonical := v_canonical || v_one;
    END LOOP;
    RETURN v_canonical;
END $$;

-- The number of a document's advisory lock.
CREATE OR REPLACE FUNCTION sidecar._document_lock(p_pipeline text, p_key text)
RETURNS bigint
LANGUAGE sql IMMUTABLE
    RETURN hashtextextended(p_pipeline || chr(31) || p_key, 8088);

-- Takes the advisory lock of each document, in the order of the locks, so that two settlements never deadlock.
CREATE OR REPLACE FUNCTION sidecar._lock_documents(p_pipeline text, p_keys text[])
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_lock bigint;
BEGIN
    FOR v_lock IN
        SELECT DISTINCT sidecar._document_lock(p_pipeline, k) AS l FROM unnest(p_keys) AS k ORDER BY l
    LOOP
        PERFORM pg_advisory_xact_lock(v_lock);
    END LOOP;
END $$;

-- The queue table of a lane or of the dead letters, quoted and qualified. p_part: live, bulk or dead.
CREATE OR REPLACE FUNCTION sidecar._queue_table(p_queue text, p_part text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    RETURN format('pgmq.%I', 'q_' || sidecar._queue_name(p_queue, p_part));
END $$;

-- The pgmq queue of a lane or of the dead letters. Raises SC010 for an unknown part.
CREATE OR REPLACE FUNCTION sidecar._queue_name(p_queue text, p_part text)
RETURNS text
LANGUAGE plpgsql IMMUTABLE SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    CASE p_part
        WHEN 'live' THEN RETURN p_queue;
        WHEN 'bulk' THEN RETURN p_queue || '_bulk';
        WHEN 'dead' THEN RETURN p_queue || '_dlq';
        ELSE RAISE EXCEPTION USING ERRCODE = 'SC010', MESSAGE = format('lane %L is not live or bulk', p_part);
    END CASE;
END $$;

-- The role that owns schema sidecar: sidecar_owner, or the migrating role where it may not create roles.
CREATE OR REPLACE FUNCTION sidecar._owner()
RETURNS name
LANGUAGE sql STABLE SET search_path = pg_catalog, pg_temp AS $$
    SELECT r.rolname FROM pg_namespace n JOIN pg_roles r ON r.oid = n.nspowner WHERE n.nspname = 'sidecar'
$$;
