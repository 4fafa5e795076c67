-- The fence: what makes the verdict on a business transaction final.

-- One row per message whose transaction was decided in this database. The business
-- transaction inserts COMMITTED as its first statement; a status check, or the SDK after a
-- rollback, inserts ROLLED_BACK. The primary key lets exactly one of them win.
CREATE TABLE handfast_fence (
    message_id uuid        NOT NULL PRIMARY KEY,
    verdict    text        NOT NULL CHECK (verdict IN ('COMMITTED', 'ROLLED_BACK')),
    -- By this database's clock; only pruning reads it.
    at         timestamptz NOT NULL DEFAULT clock_timestamp()
);

-- Pruning walks along time, never along the table.
CREATE INDEX handfast_fence_at ON handfast_fence (at);

-- Which database this is. Prepare carries the identity and a check sends it back, so that a
-- copy, a shard or another colour of the same service cannot answer for this one.
CREATE TABLE handfast_fence_identity (
    one      smallint NOT NULL PRIMARY KEY CHECK (one = 1),
    identity uuid     NOT NULL
);

INSERT INTO handfast_fence_identity (one, identity) VALUES (1, gen_random_uuid());
