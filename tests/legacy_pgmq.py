"""A database as pgmq 1.4 left it: no headers, no last_read_at, ``read`` with three arguments. Our own SQL."""

from __future__ import annotations

SQL = """
CREATE SCHEMA pgmq;

CREATE TABLE pgmq.meta (
    queue_name varchar NOT NULL UNIQUE,
    is_partitioned boolean NOT NULL,
    is_unlogged boolean NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now()
);

CREATE TYPE pgmq.message_record AS (
    msg_id bigint, read_ct integer, enqueued_at timestamptz, vt timestamptz, message jsonb
);
CREATE TYPE pgmq.queue_record AS (
    queue_name varchar, is_partitioned boolean, is_unlogged boolean, created_at timestamptz
);
CREATE TYPE pgmq.metrics_result AS (
    queue_name text, queue_length bigint, newest_msg_age_sec int, oldest_msg_age_sec int, total_messages bigint,
    scrape_time timestamptz
);

CREATE FUNCTION pgmq."create"(queue_name text) RETURNS void LANGUAGE plpgsql AS $body$
BEGIN
    EXECUTE format(
        'CREATE TABLE IF NOT EXISTS pgmq.%I (msg_id bigint PRIMARY KEY GENERATED ALWAYS AS IDENTITY, '
        'read_ct int NOT NULL DEFAULT 0, enqueued_at timestamptz NOT NULL DEFAULT now(), vt timestamptz NOT NULL, '
        'message jsonb)', 'q_' || lower(queue_name));
    EXECUTE format(
        'CREATE TABLE IF NOT EXISTS pgmq.%I (msg_id bigint PRIMARY KEY, read_ct int NOT NULL DEFAULT 0, '
        'enqueued_at timestamptz NOT NULL DEFAULT now(), archived_at timestamptz NOT NULL DEFAULT now(), '
        'vt timestamptz NOT NULL, message jsonb)', 'a_' || lower(queue_name));
    EXECUTE format('CREATE INDEX IF NOT EXISTS %I ON pgmq.%I (vt)',
        'q_' || lower(queue_name) || '_vt_idx', 'q_' || lower(queue_name));
    INSERT INTO pgmq.meta (queue_name, is_partitioned, is_unlogged) VALUES ("create".queue_name, false, false)
    ON CONFLICT DO NOTHING;
END $body$;

CREATE FUNCTION pgmq.send(queue_name text, msg jsonb, delay integer DEFAULT 0) RETURNS SETOF bigint
LANGUAGE plpgsql AS $body$
BEGIN
    RETURN QUERY EXECUTE format(
        'INSERT INTO pgmq.%I (vt, message) VALUES (clock_timestamp() + make_interval(secs => $1), $2) RETURNING msg_id',
        'q_' || lower(queue_name)) USING delay, msg;
END $body$;

CREATE FUNCTION pgmq.send_batch(queue_name text, msgs jsonb[], delay integer DEFAULT 0) RETURNS SETOF bigint
LANGUAGE plpgsql AS $body$
BEGIN
    RETURN QUERY EXECUTE format(
        'INSERT INTO pgmq.%I (vt, message) SELECT clock_timestamp() + make_interval(secs => $1), unnest($2) '
        'RETURNING msg_id', 'q_' || lower(queue_name)) USING delay, msgs;
END $body$;

CREATE FUNCTION pgmq.read(queue_name text, vt integer, qty integer) RETURNS SETOF pgmq.message_record
LANGUAGE plpgsql AS $body$
BEGIN
    RETURN QUERY EXECUTE format(
        'UPDATE pgmq.%1$I SET vt = clock_timestamp() + make_interval(secs => $1), read_ct = read_ct + 1 '
        'WHERE msg_id IN (SELECT msg_id FROM pgmq.%1$I WHERE vt <= clock_timestamp() ORDER BY msg_id LIMIT $2 '
        'FOR UPDATE SKIP LOCKED) RETURNING msg_id, read_ct, enqueued_at, vt, message',
        'q_' || lower(queue_name)) USING vt, qty;
END $body$;

CREATE FUNCTION pgmq.delete(queue_name text, msg_ids bigint[]) RETURNS SETOF bigint LANGUAGE plpgsql AS $body$
BEGIN
    RETURN QUERY EXECUTE format('DELETE FROM pgmq.%I WHERE msg_id = ANY ($1) RETURNING msg_id',
        'q_' || lower(queue_name)) USING msg_ids;
END $body$;

CREATE FUNCTION pgmq.delete(queue_name text, msg_id bigint) RETURNS boolean LANGUAGE sql AS
$body$ SELECT EXISTS (SELECT FROM pgmq.delete(queue_name, ARRAY[msg_id])) $body$;

CREATE FUNCTION pgmq.archive(queue_name text, msg_ids bigint[]) RETURNS SETOF bigint LANGUAGE plpgsql AS $body$
BEGIN
    RETURN QUERY EXECUTE format(
        'WITH gone AS (DELETE FROM pgmq.%I WHERE msg_id = ANY ($1) RETURNING *) '
        'INSERT INTO pgmq.%I (msg_id, read_ct, enqueued_at, vt, message) '
        'SELECT msg_id, read_ct, enqueued_at, vt, message FROM gone RETURNING msg_id',
        'q_' || lower(queue_name), 'a_' || lower(queue_name)) USING msg_ids;
END $body$;

CREATE FUNCTION pgmq.archive(queue_name text, msg_id bigint) RETURNS boolean LANGUAGE sql AS
$body$ SELECT EXISTS (SELECT FROM pgmq.archive(queue_name, ARRAY[msg_id])) $body$;

CREATE FUNCTION pgmq.set_vt(queue_name text, msg_id bigint, vt integer) RETURNS SETOF pgmq.message_record
LANGUAGE plpgsql AS $body$
BEGIN
    RETURN QUERY EXECUTE format(
        'UPDATE pgmq.%I SET vt = clock_timestamp() + make_interval(secs => $2) WHERE msg_id = $1 '
        'RETURNING msg_id, read_ct, enqueued_at, vt, message', 'q_' || lower(queue_name)) USING msg_id, vt;
END $body$;

CREATE FUNCTION pgmq.purge_queue(queue_name text) RETURNS bigint LANGUAGE plpgsql AS $body$
DECLARE
    removed bigint;
BEGIN
    EXECUTE format('DELETE FROM pgmq.%I', 'q_' || lower(queue_name));
    GET DIAGNOSTICS removed = ROW_COUNT;
    RETURN removed;
END $body$;

CREATE FUNCTION pgmq.drop_queue(queue_name text) RETURNS boolean LANGUAGE plpgsql AS $body$
BEGIN
    EXECUTE format('DROP TABLE IF EXISTS pgmq.%I', 'q_' || lower(queue_name));
    EXECUTE format('DROP TABLE IF EXISTS pgmq.%I', 'a_' || lower(queue_name));
    DELETE FROM pgmq.meta m WHERE m.queue_name = drop_queue.queue_name;
    RETURN FOUND;
END $body$;

CREATE FUNCTION pgmq.list_queues() RETURNS SETOF pgmq.queue_record LANGUAGE sql AS
$body$ SELECT queue_name, is_partitioned, is_unlogged, created_at FROM pgmq.meta $body$;

CREATE FUNCTION pgmq.metrics(queue_name text) RETURNS pgmq.metrics_result LANGUAGE plpgsql AS $body$
DECLARE
    found_metrics pgmq.metrics_result;
BEGIN
    EXECUTE format(
        'SELECT $1, count(*), extract(epoch FROM now() - max(enqueued_at))::int, '
        'extract(epoch FROM now() - min(enqueued_at))::int, coalesce(max(msg_id), 0), now() FROM pgmq.%I',
        'q_' || lower(queue_name)) INTO found_metrics USING queue_name;
    RETURN found_metrics;
END $body$;
"""
