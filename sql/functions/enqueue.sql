-- The trigger function of each pipeline: one set-based insert into the live queue and one NOTIFY a statement.
-- It always sends what was inserted and what changed its rendered content; duplicates coalesce at the lease.
-- Locks: row locks of the writer's own statement only. A generated function, so that its plans are cached.
-- May call: members of the owner (attach, migrate).
CREATE OR REPLACE FUNCTION sidecar._generate_enqueue(p_pipeline text)
RETURNS void
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    p sidecar.pipelines := sidecar._pipeline(p_pipeline);
    v_send text := format(
        'INSERT INTO %s (vt, message) SELECT clock_timestamp(), '
        'jsonb_build_object(''document_id'', n.%I::text, ''action'', lower(TG_OP)) FROM new_rows AS n',
        sidecar._queue_table(p.queue, 'live'), p.key_column);
    v_columns name[] := ARRAY(SELECT DISTINCT c FROM unnest(p.key_column || p.content_columns) AS c);
BEGIN
    -- A column that was renamed or dropped must not fail the writer: the daemon tells it, and the sweep that follows the
    -- next attach finds what was written meanwhile.
    -- Contents are compared byte by byte: a column's own collation may hold 'a' and 'A' equal, whose vectors differ.
    -- Nested loops are off: a cached plan made for one row would be quadratic for an UPDATE of a million.
    EXECUTE format($f$
        CREATE OR REPLACE FUNCTION sidecar.%1$I() RETURNS trigger
        LANGUAGE plpgsql SECURITY DEFINER
        SET search_path = pg_catalog, pg_temp SET enable_nestloop = off
        SET datestyle = 'ISO, YMD' SET intervalstyle = 'postgres' SET timezone = 'UTC'
        SET extra_float_digits = 1 SET bytea_output = 'hex' AS $body$
        BEGIN
            IF (SELECT count(*) FROM pg_attribute WHERE attrelid = TG_RELID AND attname = ANY (%7$L::name[])
                AND NOT attisdropped) < %8$s THEN
                RETURN NULL;
            END IF;
            IF TG_OP = 'INSERT' THEN
                %2$s;
            ELSE
                %2$s WHERE NOT EXISTS (
                    SELECT FROM old_rows AS o
                    WHERE o.%3$I::text = n.%3$I::text AND (%4$s) COLLATE "C" = (%5$s) COLLATE "C");
            END IF;
            IF FOUND THEN
                PERFORM pg_notify('sidecar', %6$L);
            END IF;
            RETURN NULL;
        END $body$
    $f$, 'enqueue_' || p.name, v_send, p.key_column, sidecar._content(p, 'o'), sidecar._content(p, 'n'), 'live:' || p.name,
    v_columns, cardinality(v_columns));
    EXECUTE format('REVOKE ALL ON FUNCTION sidecar.%I() FROM PUBLIC', 'enqueue_' || p.name);
END $$;

-- Regenerates what is generated; every migrate calls it.
-- Locks: none beyond the catalogue rows of the functions. May call: members of the owner.
CREATE OR REPLACE FUNCTION sidecar.refresh()
RETURNS integer
LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS $$
DECLARE
    v_name text;
    v_count integer := 0;
BEGIN
    FOR v_name IN SELECT name FROM sidecar.pipelines ORDER BY name LOOP
        PERFORM sidecar._generate_enqueue(v_name);
        v_count := v_count + 1;
    END LOOP;
    RETURN v_count;
END $$;
