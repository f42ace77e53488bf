-- What a pipeline wants of the index on its vectors, so that one that was put off can be told from one that was lost.
-- Runs as the owner of schema sidecar. Locks: ACCESS EXCLUSIVE on sidecar.pipelines, for an instant.

ALTER TABLE sidecar.pipelines ADD COLUMN index_mode text NOT NULL DEFAULT 'none'
    CONSTRAINT index_mode_known CHECK (index_mode IN ('live', 'deferred', 'none'));

COMMENT ON COLUMN sidecar.pipelines.index_mode IS 'live: wanted now; deferred: to be built after a load; none: not wanted';

-- A pipeline of an older release that has no index was attached without one, as far as anybody can tell.
UPDATE sidecar.pipelines AS p SET index_mode = 'live'
WHERE EXISTS (
    SELECT FROM pg_catalog.pg_index AS i
    JOIN pg_catalog.pg_attribute AS a ON a.attrelid = i.indrelid AND a.attnum = i.indkey[0] AND a.attname = 'embedding'
    JOIN pg_catalog.pg_opclass AS c ON c.oid = i.indclass[0] AND c.opcname = 'vector_cosine_ops'
    WHERE i.indrelid = p.embeddings);

ALTER TABLE sidecar.pipelines ALTER COLUMN index_mode DROP DEFAULT;

-- It gains an argument with a default: beside the older signature every call would be ambiguous.
DROP FUNCTION IF EXISTS sidecar.attach(
    regclass, text[], text, text, text, text, text, text, text, integer, text, boolean, boolean);
