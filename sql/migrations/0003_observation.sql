-- What a walk saw of the whole source, so that coverage can be told without counting a table: how many documents there
-- are, and how many lacked a vector of their current text and model. last_* are those of the last finished walk.
-- Runs as the owner of schema sidecar. Locks: ACCESS EXCLUSIVE on sidecar.sweeps, for an instant.

ALTER TABLE sidecar.sweeps
    ADD COLUMN documents bigint,
    ADD COLUMN wanting bigint,
    ADD COLUMN last_documents bigint,
    ADD COLUMN last_wanting bigint,
    ADD COLUMN last_finished_at timestamptz;

COMMENT ON COLUMN sidecar.sweeps.documents IS 'documents of this walk that are not blank; null in a walk that began before they were counted';
COMMENT ON COLUMN sidecar.sweeps.wanting IS 'of these, without a current vector, whether or not a message waits for them';
