-- Pipelines and the state of their sweeps. Runs as the owner of schema sidecar.

CREATE TABLE sidecar.pipelines (
    name text PRIMARY KEY
        CONSTRAINT name_is_plain CHECK (name ~ '^[a-z_][a-z0-9_]{0,40}$'),
    source regclass NOT NULL,
    key_column text NOT NULL,
    key_type text NOT NULL,
    key_equals text NOT NULL,
    key_follows text NOT NULL,
    content_columns text[] NOT NULL
        CONSTRAINT content_is_named CHECK (cardinality(content_columns) > 0),
    embeddings regclass NOT NULL UNIQUE,
    embeddings_key text NOT NULL,
    queue text NOT NULL UNIQUE
        CONSTRAINT queue_is_plain CHECK (queue ~ '^[a-z_][a-z0-9_]{0,40}$'),
    model text NOT NULL,
    model_id text,
    dimensions integer NOT NULL
        CONSTRAINT dimensions_fit CHECK (dimensions BETWEEN 1 AND 16000),
    long_documents text NOT NULL
        CONSTRAINT long_documents_known CHECK (long_documents IN ('mean', 'chunks', 'truncate')),
    store_text boolean NOT NULL,
    enabled boolean NOT NULL DEFAULT true,
    created_at timestamptz NOT NULL DEFAULT now(),
    updated_at timestamptz NOT NULL DEFAULT now()
);

COMMENT ON COLUMN sidecar.pipelines.key_type IS 'type name without modifier, so that a cast never truncates';
COMMENT ON COLUMN sidecar.pipelines.key_equals IS 'schema-qualified equality operator of the key''s index';
COMMENT ON COLUMN sidecar.pipelines.key_follows IS 'schema-qualified greater-than operator of the key''s index';
COMMENT ON COLUMN sidecar.pipelines.model_id IS 'null until a daemon registers what it loaded';

-- One row a pipeline. A walk is under way while finished_at is null.
CREATE TABLE sidecar.sweeps (
    pipeline text PRIMARY KEY REFERENCES sidecar.pipelines (name) ON DELETE CASCADE ON UPDATE CASCADE,
    backfill boolean NOT NULL,
    position text,
    started_at timestamptz,
    finished_at timestamptz,
    scanned bigint NOT NULL DEFAULT 0,
    missing bigint NOT NULL DEFAULT 0,
    outdated bigint NOT NULL DEFAULT 0,
    wrong_model bigint NOT NULL DEFAULT 0,
    surplus bigint NOT NULL DEFAULT 0,
    enqueued bigint NOT NULL DEFAULT 0
);

COMMENT ON COLUMN sidecar.sweeps.position IS 'the last key that the walk has seen, as text; null at the start';
