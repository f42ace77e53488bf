-- What is known about one document of a pipeline: facts from one snapshot, by the database's clock, never its text.
-- p_key: the key, in any spelling that its type reads. A message that spells it otherwise again is not found.
-- Columns: key (canonical), source, model, model_id, enabled, and objects of JSON, null where there is none:
--   document     hash (md5), bytes, blank; of the current content
--   vector       chunks, model, text_current, model_current, written_at, age_seconds; of chunk 0
--   messages     a list by lane and age: lane, id, action, reads, attempt (of its last lease; null before the first),
--                next_attempt, visible, held (its last lease has not ended by itself), until, hidden_seconds,
--                age_seconds, ahead (visible messages before it in its lane), error (code of the last failure that
--                counted, or released)
--   dead_letter  id, reason, detail, attempts, dead_at, age_seconds, resolved; the newest
--   triggers     insert, update: on, disabled, replica only, missing
--   sweep        asked, walking, backfill, passed (the walk under way is beyond this key), started_seconds (since its
--                start; null before the first)
-- Locks: none. May call: sidecar_runtime. Not sidecar_reader: hash and length would go around the source's policies.
-- Raises SC002, SC010 when p_key is no value of the key's type, 42P01.
CREATE OR REPLACE FUNCTION sidecar.explain_document(p_pipeline text, p_key text)
RETURNS TABLE (key text, source text, model text, model_id text, enabled boolean, document jsonb, vector jsonb,
               messages jsonb, dead_letter jsonb, triggers jsonb, sweep jsonb)
LANGUAGE plpgsql STABLE SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p sidecar.pipelines := sidecar._intact(p_pipeline);
    w sidecar.sweeps;
    v_names text[];
    v_now timestamptz := clock_timestamp();
BEGIN
    key := (sidecar._canonical_keys(p.key_type, ARRAY[p_key]))[1];
    IF key IS NULL THEN
        RAISE EXCEPTION USING ERRCODE = 'SC010', MESSAGE = format(
            'key %L is no value of type %s, which column %I of table %s has', left(p_key, 60), p.key_type, p.key_column,
            p.source::text);
    END IF;
    source := p.source::text;
    model := p.model;
    model_id := p.model_id;
    enabled := p.enabled;

    -- The row's own spelling too: 1.0 and 1.00 are one key, and messages carry the row's.
    EXECUTE format($q$
        SELECT ARRAY[$1, $2, s.%1$I::text],
               jsonb_build_object('hash', md5(c.content), 'bytes', octet_length(c.content),
                                  'blank', sidecar._blank(c.content))
        FROM %2$s AS s CROSS JOIN LATERAL (SELECT %3$s AS content) AS c WHERE s.%1$I %4$s $2::%5$s
    $q$, p.key_column, sidecar._table(p.name, p.source), sidecar._content(p, 's'), p.key_equals, p.key_type)
    INTO v_names, document USING p_key, key;
    v_names := coalesce(v_names, ARRAY[p_key, key]);

    EXECUTE format($q$
        SELECT jsonb_build_object('chunks', (SELECT count(*) FROM %1$s AS a WHERE a.%2$I %3$s $1::%4$s),
            'model', e.model, 'text_current', coalesce(e.source_text_hash = $2, false),
            'model_current', e.model = coalesce($3, e.model), 'written_at', date_trunc('second', e.updated_at)::text,
            'age_seconds', extract(epoch FROM $4 - e.updated_at))
        FROM %1$s AS e WHERE e.%2$I %3$s $1::%4$s AND e.chunk_no = 0
    $q$, sidecar._table(p.name, p.embeddings), p.embeddings_key, p.key_equals, p.key_type)
    INTO vector USING key, document ->> 'hash', p.model_id, v_now;

    messages := sidecar._explain_messages(p, v_names, v_now);

    EXECUTE format($q$
        SELECT jsonb_build_object('id', d.msg_id, 'reason', d.message ->> 'reason', 'detail', d.message ->> 'detail',
            'attempts', sidecar._whole(d.message -> 'attempts'),
            'dead_at', date_trunc('second', (d.message ->> 'dead_at')::timestamptz)::text,
            'age_seconds', extract(epoch FROM $4 - (d.message ->> 'dead_at')::timestamptz),
            'resolved', $2 IS DISTINCT FROM d.message ->> 'content_hash' OR $3)
        FROM %s AS d WHERE d.message ->> 'document_id' = ANY ($1) ORDER BY d.msg_id DESC LIMIT 1
    $q$, sidecar._queue_table(p.queue, 'dead'))
    INTO dead_letter USING v_names, document ->> 'hash',
        coalesce((vector ->> 'text_current')::boolean AND (vector ->> 'model_current')::boolean, false), v_now;

    SELECT jsonb_object_agg(e.event, coalesce(CASE t.tgenabled WHEN 'D' THEN 'disabled' WHEN 'R' THEN 'replica only'
        WHEN 'O' THEN 'on' WHEN 'A' THEN 'on' END, 'missing')) INTO triggers
    FROM unnest(ARRAY['insert', 'update']) AS e (event)
    LEFT JOIN pg_trigger AS t ON t.tgrelid = p.source AND t.tgname = format('sidecar_%s_%s', p.name, e.event);

    SELECT * INTO w FROM sidecar.sweeps AS s WHERE s.pipeline = p.name;
    sweep := jsonb_build_object('asked', w.started_at IS NULL, 'backfill', coalesce(w.backfill, true),
        'walking', w.started_at IS NOT NULL AND w.finished_at IS NULL, 'passed', false,
        'started_seconds', extract(epoch FROM v_now - w.started_at));
    IF w.position IS NOT NULL AND w.finished_at IS NULL THEN
        EXECUTE format($q$SELECT $1 || jsonb_build_object('passed', NOT ($2::%1$s %2$s $3::%1$s))$q$,
            p.key_type, p.key_follows) INTO sweep USING sweep, key, w.position;
    END IF;
    RETURN NEXT;
END $$;

-- The messages of both lanes that name a document by any of these texts.
-- Attempts are counted as sidecar.lease counts them, for the last lease and for the next.
-- Locks: none. May call: explain_document.
CREATE OR REPLACE FUNCTION sidecar._explain_messages(p sidecar.pipelines, p_names text[], p_now timestamptz)
RETURNS jsonb
LANGUAGE plpgsql STABLE SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_lane text;
    v_found jsonb;
    v_all jsonb := '[]';
BEGIN
    FOREACH v_lane IN ARRAY ARRAY['live', 'bulk'] LOOP
        EXECUTE format($q$
            SELECT coalesce(jsonb_agg(jsonb_build_object('lane', $3, 'id', q.msg_id,
                'action', left(q.message ->> 'action', 40), 'reads', q.read_ct,
                'attempt', CASE WHEN q.read_ct > 0 THEN q.read_ct - least(q.read_ct - 1, c.excused) END,
                'next_attempt', q.read_ct + 1 - least(q.read_ct, c.excused + (q.read_ct - c.excused >= 2
                    AND sidecar._count(q.message, 'accounted') < q.read_ct)::integer),
                'visible', q.vt <= $2,
                'held', q.read_ct > 0 AND sidecar._count(q.message, 'ended') <> q.read_ct,
                'until', date_trunc('second', q.vt)::text, 'hidden_seconds', greatest(0, extract(epoch FROM q.vt - $2)),
                'age_seconds', greatest(0, extract(epoch FROM $2 - q.enqueued_at)), 'ahead', q.ahead,
                'error', left(q.message #>> '{sidecar,error}', 60)) ORDER BY q.msg_id), '[]')
            FROM (SELECT a.msg_id, a.read_ct, a.enqueued_at, a.vt, a.message, count(*) FILTER (WHERE a.vt <= $2) OVER (
                    ORDER BY a.msg_id ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS ahead FROM %s AS a) AS q
            CROSS JOIN LATERAL (SELECT sidecar._count(q.message, 'excused') AS excused) AS c
            WHERE sidecar._named_key(q.message) = ANY ($1)
        $q$, sidecar._queue_table(p.queue, v_lane)) INTO v_found USING p_names, p_now, v_lane;
        v_all := v_all || v_found;
    END LOOP;
    RETURN v_all;
END $$;
