-- Whose turn it is to run a pass that one process runs for all.

-- One row per such pass, made by who asks first. Who moves `due_at` forward has the turn; when it has come, the next one
-- may take it, so a process that died or stands still holds nobody up for longer than that.
CREATE TABLE turn (
    pass     text        NOT NULL COLLATE "C" PRIMARY KEY,
    due_at   timestamptz NOT NULL,
    -- The process that had the last turn.
    taken_by uuid,
    -- How many turns there were.
    taken    bigint      NOT NULL DEFAULT 0
) WITH (fillfactor = 50);
