-- Which replica embeds which text of a document now, so that two with messages of one document do the work once.
-- A claim is a hint, never a lock: losing one costs a second run of the model, and truth rests on settle alone. Hence
-- UNLOGGED: nothing of it is written ahead, a crashed server forgets it. Hence no foreign key to the pipeline either:
-- its row lock would be logged, and every read would wait for a flush; detach removes the claims instead.
-- Runs as the owner of schema sidecar. Locks: none that others wait for.

CREATE UNLOGGED TABLE sidecar.claims (
    pipeline text NOT NULL,
    key text NOT NULL,
    hash text NOT NULL,
    model text NOT NULL,
    claimant text NOT NULL,
    expires_at timestamptz NOT NULL,
    PRIMARY KEY (pipeline, key)
) WITH (
    fillfactor = 70, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000,
    autovacuum_vacuum_cost_delay = 0, autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 5000
);

COMMENT ON COLUMN sidecar.claims.hash IS 'md5 of the rendered content; a claim on another text is taken over';
COMMENT ON COLUMN sidecar.claims.claimant IS 'one worker of one process';

-- They gain arguments with defaults: beside the older signatures every call would be ambiguous.
DROP FUNCTION IF EXISTS sidecar.read_documents(text, text, text[], bigint, bigint);
DROP FUNCTION IF EXISTS sidecar.extend(text, text, bigint[], integer[], double precision);
DROP FUNCTION IF EXISTS sidecar.defer(text, text, bigint[], integer[], double precision[], text, boolean);
DROP FUNCTION IF EXISTS sidecar.acknowledge(text, text, bigint[], integer[]);
