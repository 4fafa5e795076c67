-- The fence: what makes the verdict on a business transaction final.

-- One row per message whose transaction was decided in this database. The business
-- transaction inserts COMMITTED as its first statement; a status check, or the SDK after a
-- rollback, inserts ROLLED_BACK. The primary key lets exactly one of them win.
CREATE TABLE handfast_fence (
    message_id BLOB    NOT NULL PRIMARY KEY CHECK (length(message_id) = 16),
    verdict    TEXT    NOT NULL CHECK (verdict IN ('COMMITTED', 'ROLLED_BACK')),
    -- Microseconds since 1970 UTC, by this database's host; only pruning reads it.
    at         INTEGER NOT NULL
) WITHOUT ROWID;

-- Pruning walks along time, never along the table.
CREATE INDEX handfast_fence_at ON handfast_fence (at);

-- Which database this is. Prepare carries the identity and a check sends it back, so that a
-- copy, a shard or another colour of the same service cannot answer for this one.
CREATE TABLE handfast_fence_identity (
    one      INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    identity BLOB    NOT NULL CHECK (length(identity) = 16)
);

INSERT INTO handfast_fence_identity (one, identity) VALUES (1, randomblob(16));
