-- Points inside settle, where a replica has no code of its own: a statement that passes an armed one takes an advisory
-- lock that tells the rig whose backend it is, and stays there until it is killed or told to go on. pg_locks shows the
-- locks of every database of the server, and mutants run side by side, each in a database of its own: hence _locks.
-- The writer passes some of the points too, as its deletes cascade: it is never held, and never killed.

CREATE TABLE audit.armed (point text PRIMARY KEY);

CREATE VIEW audit._locks AS
    SELECT pid, objid, granted FROM pg_locks
    WHERE locktype = 'advisory' AND classid = 4711
        AND database = (SELECT oid FROM pg_database WHERE datname = current_database());

-- The backend that is at an armed point; null while none is.
CREATE FUNCTION audit.reached() RETURNS integer LANGUAGE sql AS $$ SELECT pid FROM audit._locks WHERE objid = 0 AND granted LIMIT 1 $$;

CREATE FUNCTION audit.pause() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER AS $$
BEGIN
    IF session_user LIKE 'torture\_daemon%' AND EXISTS (SELECT FROM audit.armed WHERE point = TG_ARGV[0]) THEN
        PERFORM pg_advisory_xact_lock_shared(4711, 0);
        FOR i IN 1 .. 1000 LOOP  -- until it is killed, or told to go on
            EXIT WHEN EXISTS (SELECT FROM audit._locks WHERE objid = 1);
            PERFORM pg_sleep(0.03);
        END LOOP;
    END IF;
    RETURN NULL;
END $$;

-- Lets whoever waits go on, for as long as the session of the caller lasts.
CREATE FUNCTION audit.go_on() RETURNS void LANGUAGE sql AS $$ SELECT pg_advisory_lock(4711, 1) $$;

-- lock: the documents are locked and their hashes read; upsert: vectors are written; ack: messages are deleted;
-- commit: everything is done but the commit itself.
CREATE FUNCTION audit.plant(p_vectors regclass, p_queue regclass) RETURNS void LANGUAGE plpgsql AS $$
BEGIN
    EXECUTE format('CREATE TRIGGER pause_lock BEFORE DELETE ON %s FOR EACH STATEMENT EXECUTE FUNCTION audit.pause(''lock'')', p_vectors);
    EXECUTE format('CREATE TRIGGER pause_upsert AFTER INSERT OR UPDATE ON %s FOR EACH STATEMENT EXECUTE FUNCTION audit.pause(''upsert'')', p_vectors);
    EXECUTE format('CREATE TRIGGER pause_ack AFTER DELETE ON %s FOR EACH STATEMENT EXECUTE FUNCTION audit.pause(''ack'')', p_queue);
    EXECUTE format('CREATE CONSTRAINT TRIGGER pause_commit AFTER INSERT OR UPDATE ON %s DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION audit.pause(''commit'')', p_vectors);
END $$;
