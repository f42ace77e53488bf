-- Walks one window of the source by key and enqueues on the bulk lane what is missing, outdated, of another model, or
-- blank with vectors left over. A dead letter whose content has not changed is left alone, unless that content was embedded
-- since (by an earlier model, say), and so is what has a message in a lane already. A row that cannot be rendered is
-- enqueued unless it has a dead letter: whoever reads it says what is wrong with it.
-- A walk starts at most every p_interval seconds; a backfill starts at once. It waits while a lane is deeper than
-- p_depth. Columns: state (walked, finished, waiting, resting, busy), what this window found, and whether this is a
-- backfill.
-- Locks: one advisory xact lock a pipeline (tried, not waited for), the pipeline's row in sidecar.sweeps.
-- May call: sidecar_runtime. Raises SC002, SC003.
CREATE OR REPLACE FUNCTION sidecar.sweep(
    p_pipeline text, p_rows integer DEFAULT 5000, p_interval double precision DEFAULT 300,
    p_depth integer DEFAULT 10000)
RETURNS TABLE (state text, scanned bigint, missing bigint, outdated bigint, wrong_model bigint, surplus bigint,
               enqueued bigint, backfill boolean)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp SET enable_nestloop = off
SET lock_timeout = '500ms' AS $$
DECLARE
    p sidecar.pipelines;
    w sidecar.sweeps;
    v_deep boolean;
    v_last text;
    v_documents bigint;
    v_wanting bigint;
    v_rows integer := p_rows;
BEGIN
    scanned := 0; missing := 0; outdated := 0; wrong_model := 0; surplus := 0; enqueued := 0; backfill := false;
    IF NOT pg_try_advisory_xact_lock(hashtextextended('sweep' || chr(31) || p_pipeline, 8088)) THEN
        state := 'busy';
        RETURN NEXT;
        RETURN;
    END IF;
    -- In this order: whoever changes a pipeline asks for a walk, and that walk must see what was changed.
    SELECT * INTO w FROM sidecar.sweeps AS s WHERE s.pipeline = p_pipeline;
    p := sidecar._intact(p_pipeline);
    IF NOT p.enabled THEN
        RAISE EXCEPTION USING ERRCODE = 'SC003', MESSAGE = format('pipeline %s is paused', p_pipeline);
    END IF;
    backfill := w.backfill;
    IF w.finished_at IS NOT NULL AND w.started_at > clock_timestamp() - make_interval(secs => p_interval) THEN
        state := 'resting';
        RETURN NEXT;
        RETURN;
    END IF;
    -- Its lock before those of the queues, as detach takes them.
    EXECUTE format('SELECT FROM %s LIMIT 0', sidecar._table(p.name, p.source));
    EXECUTE format('SELECT (SELECT count(*) FROM (SELECT FROM %s LIMIT $1) AS l) = $1 '
                   'OR (SELECT count(*) FROM (SELECT FROM %s LIMIT $1) AS b) = $1',
        sidecar._queue_table(p.queue, 'live'), sidecar._queue_table(p.queue, 'bulk')) INTO v_deep USING p_depth;
    IF v_deep THEN
        state := 'waiting';
        RETURN NEXT;
        RETURN;
    END IF;
    IF w.finished_at IS NOT NULL OR w.started_at IS NULL THEN
        UPDATE sidecar.sweeps AS s SET position = NULL, started_at = clock_timestamp(), finished_at = NULL,
            scanned = 0, missing = 0, outdated = 0, wrong_model = 0, surplus = 0, enqueued = 0, documents = 0, wanting = 0
        WHERE s.pipeline = p_pipeline;
        w.position := NULL;
    END IF;
    LOOP
        BEGIN
            EXECUTE format($q$
                WITH walked AS MATERIALIZED (
                    -- Not a join: with nested loops off every window would read the whole table of vectors.
                    SELECT s.%1$I AS key, %2$s AS content, (SELECT ARRAY[e.source_text_hash, e.model, e.updated_at::text] FROM %6$s AS e
                        WHERE e.%5$I %7$s s.%1$I AND e.chunk_no = 0) AS vector
                    FROM %3$s AS s %4$s ORDER BY s.%1$I LIMIT $2
                ), judged AS MATERIALIZED (
                    SELECT w.key::text AS key, md5(w.content) AS hash, CASE
                        WHEN sidecar._blank(w.content) THEN CASE WHEN w.vector IS NULL THEN 'blank' ELSE 'surplus' END
                        WHEN w.vector IS NULL THEN 'missing'
                        WHEN w.vector[1] IS DISTINCT FROM md5(w.content) THEN 'outdated'
                        WHEN w.vector[2] IS DISTINCT FROM coalesce($3, w.vector[2]) THEN 'wrong_model'
                        ELSE 'fine' END AS verdict,
                        CASE WHEN w.vector[1] = md5(w.content) THEN w.vector[3]::timestamptz END AS answered_at
                    FROM walked AS w
                ), wanted AS MATERIALIZED (
                    SELECT j.key, j.verdict FROM judged AS j WHERE j.verdict NOT IN ('fine', 'blank') AND NOT EXISTS (
                        SELECT FROM %8$s AS d
                        WHERE d.message ->> 'document_id' = j.key AND d.message ->> 'content_hash' = j.hash
                        AND (j.answered_at IS NULL OR d.enqueued_at >= j.answered_at))
                    AND NOT EXISTS (SELECT FROM %9$s AS q WHERE q.message ->> 'document_id' = j.key)
                    AND NOT EXISTS (SELECT FROM %10$s AS q WHERE q.message ->> 'document_id' = j.key)
                ), sent AS (
                    INSERT INTO %9$s (vt, message)
                    SELECT clock_timestamp(), jsonb_build_object('document_id', w.key, 'action', w.verdict) FROM wanted AS w
                )
                SELECT (SELECT count(*) FROM walked),
                       (SELECT w.key::text FROM walked AS w ORDER BY w.key DESC LIMIT 1),
                       count(*) FILTER (WHERE w.verdict = 'missing'), count(*) FILTER (WHERE w.verdict = 'outdated'),
                       count(*) FILTER (WHERE w.verdict = 'wrong_model'), count(*) FILTER (WHERE w.verdict = 'surplus'),
                       count(*),
                       (SELECT count(*) FROM judged AS j WHERE j.verdict NOT IN ('blank', 'surplus')),
                       (SELECT count(*) FROM judged AS j WHERE j.verdict NOT IN ('blank', 'surplus', 'fine'))
                FROM wanted AS w
            $q$, p.key_column, sidecar._content(p, 's'), sidecar._table(p.name, p.source),
                 CASE WHEN w.position IS NOT NULL
                      THEN format('WHERE s.%I %s $1::%s', p.key_column, p.key_follows, p.key_type) ELSE '' END,
                 p.embeddings_key, sidecar._table(p.name, p.embeddings), p.key_equals, sidecar._queue_table(p.queue, 'dead'),
                 sidecar._queue_table(p.queue, 'bulk'), sidecar._queue_table(p.queue, 'live'))
            INTO scanned, v_last, missing, outdated, wrong_model, surplus, enqueued, v_documents, v_wanting
            USING w.position, v_rows, p.model_id;
            EXIT;
        EXCEPTION WHEN data_exception THEN
            IF v_rows = 1 THEN
                SELECT * INTO scanned, v_last, enqueued FROM sidecar._pass_over(p, w.position);
                missing := 0; outdated := 0; wrong_model := 0; surplus := 0; v_documents := 1; v_wanting := 1;
                EXIT;
            END IF;
            v_rows := greatest(1, v_rows / 8);
        END;
    END LOOP;
    state := CASE WHEN scanned < v_rows THEN 'finished' ELSE 'walked' END;
    UPDATE sidecar.sweeps AS s SET
        position = coalesce(v_last, s.position),
        finished_at = CASE WHEN state = 'finished' THEN clock_timestamp() END,
        backfill = s.backfill AND (state <> 'finished' OR s.started_at IS NULL),  -- null: asked for meanwhile
        scanned = s.scanned + sweep.scanned, missing = s.missing + sweep.missing,
        outdated = s.outdated + sweep.outdated, wrong_model = s.wrong_model + sweep.wrong_model,
        surplus = s.surplus + sweep.surplus, enqueued = s.enqueued + sweep.enqueued,
        documents = s.documents + v_documents, wanting = s.wanting + v_wanting,
        last_documents = CASE WHEN state = 'finished' THEN s.documents + v_documents ELSE s.last_documents END,
        last_wanting = CASE WHEN state = 'finished' THEN s.wanting + v_wanting ELSE s.last_wanting END,
        last_finished_at = CASE WHEN state = 'finished' AND s.documents IS NOT NULL THEN clock_timestamp()
                                ELSE s.last_finished_at END
    WHERE s.pipeline = p_pipeline;
    IF enqueued > 0 THEN
        PERFORM pg_notify('sidecar', 'bulk:' || p_pipeline);
    END IF;
    RETURN NEXT;
END $$;

-- Passes over one row that cannot be rendered, the next after a position: enqueues it on the bulk lane unless it has a dead
-- letter or a message. Columns: what sweep counts of it.
-- Locks: none beyond those of its insert. May call: sweep.
CREATE OR REPLACE FUNCTION sidecar._pass_over(
    p sidecar.pipelines, p_position text, OUT scanned bigint, OUT key text, OUT enqueued bigint)
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    EXECUTE format('SELECT s.%1$I::text FROM %2$s AS s %3$s ORDER BY s.%1$I LIMIT 1',
        p.key_column, sidecar._table(p.name, p.source),
        CASE WHEN p_position IS NOT NULL
             THEN format('WHERE s.%I %s $1::%s', p.key_column, p.key_follows, p.key_type) ELSE '' END)
    INTO STRICT key USING p_position;
    scanned := 1;
    EXECUTE format($q$
        INSERT INTO %1$s (vt, message)
        SELECT clock_timestamp(), jsonb_build_object('document_id', $1, 'action', 'missing')
        WHERE NOT EXISTS (SELECT FROM %1$s AS q WHERE q.message ->> 'document_id' = $1)
        AND NOT EXISTS (SELECT FROM %2$s AS q WHERE q.message ->> 'document_id' = $1)
        AND NOT EXISTS (SELECT FROM %3$s AS q WHERE q.message ->> 'document_id' = $1)
    $q$, sidecar._queue_table(p.queue, 'bulk'), sidecar._queue_table(p.queue, 'live'), sidecar._queue_table(p.queue, 'dead'))
    USING key;
    GET DIAGNOSTICS enqueued = ROW_COUNT;
END $$;

-- Forgets what the last walk counted: it judged by another model or another content.
-- Locks: the pipeline's row in sidecar.sweeps. May call: the functions of this schema.
CREATE OR REPLACE FUNCTION sidecar._forget_walk(p_pipeline text)
RETURNS void
LANGUAGE plpgsql SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    UPDATE sidecar.sweeps SET last_documents = NULL, last_wanting = NULL, last_finished_at = NULL
    WHERE pipeline = p_pipeline;
END $$;

-- Makes the next walk start at once, from the beginning. p_backfill: without the duty limit of routine walks.
-- Locks: the pipeline's row in sidecar.sweeps. May call: sidecar_runtime.
CREATE OR REPLACE FUNCTION sidecar.request_sweep(p_pipeline text, p_backfill boolean DEFAULT true)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
BEGIN
    PERFORM sidecar._pipeline(p_pipeline);
    INSERT INTO sidecar.sweeps AS s (pipeline, backfill) VALUES (p_pipeline, p_backfill)
    ON CONFLICT (pipeline) DO UPDATE SET backfill = s.backfill OR excluded.backfill, position = NULL,
        started_at = NULL, finished_at = NULL;
    PERFORM pg_notify('sidecar', 'sweep:' || p_pipeline);
END $$;
