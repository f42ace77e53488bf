-- Leases messages of one lane, and keeps, defers, releases and acknowledges them under their fence (msg_id, read_ct).
-- Bookkeeping stands in the message under "sidecar":
--   excused    leases that do not count as attempts
--   accounted  read_ct of the last lease whose end is known (deferred, released) or which was announced (begin)
--   ended      read_ct of the last lease that was deferred or released: a call that comes late or twice (an extension
--              under way, an answer that was lost) finds nothing of it to hold, to excuse or to count
-- attempt = read_ct - excused, at least 1 whatever a foreign message claims. The first unclean end of a lease counts, and makes the message a suspect. A suspect's
-- later unclean ends count only when it had begun: what merely waited beside the culprit is excused.
-- p_claimant: the worker whose claims on p_keys, the documents of these messages, end or last with its leases.
-- Every statement on a queue names its messages as an array beside the fence: what it touches is then bounded by them,
-- whatever the planner believes of a table that is filled and emptied all day (see claims).
-- Locks: row locks on the messages concerned, then on their claims. May call: sidecar_runtime.

-- Up to p_limit visible messages, oldest first, for p_seconds. The caller commits before it reads any document.
-- Raises SC001, SC002, SC003. key is null for a foreign shape; last_error is the code of the
-- last counted failure, or released.
CREATE OR REPLACE FUNCTION sidecar.lease(
    p_pipeline text, p_model_id text, p_lane text, p_seconds integer, p_limit integer)
RETURNS TABLE (msg_id bigint, read_ct integer, attempt integer, key text, age_seconds double precision, last_error text)
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
#variable_conflict use_column
DECLARE
    p sidecar.pipelines := sidecar._workable(p_pipeline, p_model_id);
    v_ids bigint[];
    v_reads integer[];
    v_excused integer[];
    v_keys text[];
    v_ages double precision[];
    v_errors text[];
    v_innocent bigint[];
BEGIN
    SELECT array_agg(m.msg_id ORDER BY m.msg_id), array_agg(m.read_ct ORDER BY m.msg_id),
           array_agg(least(m.read_ct - 1, sidecar._count(m.message, 'excused') + u.innocent::integer) ORDER BY m.msg_id),
           array_agg(sidecar._named_key(m.message) ORDER BY m.msg_id),
           array_agg(extract(epoch FROM clock_timestamp() - m.enqueued_at)::double precision ORDER BY m.msg_id),
           array_agg(m.message #>> '{sidecar,error}' ORDER BY m.msg_id),
           array_agg(m.msg_id) FILTER (WHERE u.innocent)
    INTO v_ids, v_reads, v_excused, v_keys, v_ages, v_errors, v_innocent
    FROM pgmq.read(sidecar._queue_name(p.queue, p_lane), p_seconds, p_limit) AS m
    CROSS JOIN LATERAL (SELECT
        m.read_ct - 1 - sidecar._count(m.message, 'excused') >= 2
        AND sidecar._count(m.message, 'accounted') < m.read_ct - 1 AS innocent) AS u;
    IF v_ids IS NULL THEN
        RETURN;
    END IF;
    IF v_innocent IS NOT NULL THEN
        EXECUTE format(
            'UPDATE %s SET message = sidecar._noted(message, '
            'jsonb_build_object(''excused'', sidecar._count(message, ''excused'') + 1)) WHERE msg_id = ANY ($1)',
            sidecar._queue_table(p.queue, p_lane)) USING v_innocent;
    END IF;
    v_keys := sidecar._canonical_keys(p.key_type, v_keys);
    RETURN QUERY
        SELECT v_ids[i], v_reads[i], v_reads[i] - v_excused[i], v_keys[i], v_ages[i], v_errors[i]
        FROM generate_subscripts(v_ids, 1) AS i;
END $$;

-- Announces that suspects begin now: their texts are read next. Returns how many are still ours.
CREATE OR REPLACE FUNCTION sidecar.begin(p_pipeline text, p_lane text, p_ids bigint[], p_read_cts integer[])
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_count integer;
BEGIN
    EXECUTE format(
        'UPDATE %s AS q SET message = sidecar._noted(q.message, jsonb_build_object(''accounted'', q.read_ct)) '
        'FROM unnest($1, $2) AS f (msg_id, read_ct) '
        'WHERE q.msg_id = ANY ($1) AND q.msg_id = f.msg_id AND q.read_ct = f.read_ct',
        sidecar._queue_table((sidecar._pipeline(p_pipeline)).queue, p_lane)) USING p_ids, p_read_cts;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    RETURN v_count;
END $$;

-- Holds leases for p_seconds from now. Returns the ids that are still ours.
CREATE OR REPLACE FUNCTION sidecar.extend(
    p_pipeline text, p_lane text, p_ids bigint[], p_read_cts integer[], p_seconds double precision,
    p_keys text[] DEFAULT NULL, p_claimant text DEFAULT NULL)
RETURNS SETOF bigint
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_held bigint[];
BEGIN
    EXECUTE format(
        'WITH held AS (UPDATE %s AS q SET vt = clock_timestamp() + make_interval(secs => $3) '
        'FROM unnest($1, $2) AS f (msg_id, read_ct) '
        'WHERE q.msg_id = ANY ($1) AND q.msg_id = f.msg_id AND q.read_ct = f.read_ct '
        'AND sidecar._count(q.message, ''ended'') <> q.read_ct RETURNING q.msg_id) '
        'SELECT array_agg(h.msg_id) FROM held AS h',
        sidecar._queue_table((sidecar._pipeline(p_pipeline)).queue, p_lane))
    INTO v_held USING p_ids, p_read_cts, p_seconds;
    -- Not those of lost messages: whoever leased them waits for the claim.
    PERFORM sidecar._extend_claims(p_pipeline, array_agg(m.key), p_claimant, p_seconds)
    FROM unnest(p_ids, p_keys) AS m (msg_id, key) WHERE m.msg_id = ANY (v_held);
    RETURN QUERY SELECT unnest(v_held);
END $$;

-- Makes each message visible again after its delay in seconds. p_excuse: the lease does not count as an attempt
-- (a release); otherwise p_code says why it counts. Returns how many were still ours; wakes workers when at once.
CREATE OR REPLACE FUNCTION sidecar.defer(
    p_pipeline text, p_lane text, p_ids bigint[], p_read_cts integer[], p_delays double precision[],
    p_code text, p_excuse boolean, p_keys text[] DEFAULT NULL, p_claimant text DEFAULT NULL)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_count integer;
BEGIN
    EXECUTE format(
        'UPDATE %s AS q SET vt = clock_timestamp() + make_interval(secs => f.delay), '
        'message = sidecar._noted(q.message, jsonb_build_object(''accounted'', q.read_ct, ''ended'', q.read_ct, ''error'', $4, '
        '''excused'', sidecar._count(q.message, ''excused'') + $5::integer)) '
        'FROM unnest($1, $2, $3) AS f (msg_id, read_ct, delay) '
        'WHERE q.msg_id = ANY ($1) AND q.msg_id = f.msg_id AND q.read_ct = f.read_ct '
        'AND sidecar._count(q.message, ''ended'') <> q.read_ct',
        sidecar._queue_table((sidecar._pipeline(p_pipeline)).queue, p_lane))
    USING p_ids, p_read_cts, p_delays, p_code, p_excuse;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    PERFORM sidecar._free_claims(p_pipeline, p_keys, p_claimant);
    IF v_count > 0 AND 0 = ANY (p_delays) THEN
        PERFORM pg_notify('sidecar', p_lane || ':' || p_pipeline);
    END IF;
    RETURN v_count;
END $$;

-- Removes messages that need no vector. Returns how many were still ours.
CREATE OR REPLACE FUNCTION sidecar.acknowledge(
    p_pipeline text, p_lane text, p_ids bigint[], p_read_cts integer[],
    p_keys text[] DEFAULT NULL, p_claimant text DEFAULT NULL)
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_count integer;
BEGIN
    EXECUTE format(
        'DELETE FROM %s AS q USING unnest($1, $2) AS f (msg_id, read_ct) '
        'WHERE q.msg_id = ANY ($1) AND q.msg_id = f.msg_id AND q.read_ct = f.read_ct',
        sidecar._queue_table((sidecar._pipeline(p_pipeline)).queue, p_lane)) USING p_ids, p_read_cts;
    GET DIAGNOSTICS v_count = ROW_COUNT;
    PERFORM sidecar._free_claims(p_pipeline, p_keys, p_claimant);
    RETURN v_count;
END $$;
