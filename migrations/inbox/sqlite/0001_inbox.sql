-- The inbox: what makes an effect happen once though its message may come more often.

-- One row per subscription and message, inserted in the transaction of the effect. The
-- subscription is part of the key because two consumers may share a database.
CREATE TABLE handfast_inbox (
    subscription TEXT    NOT NULL,
    message_id   BLOB    NOT NULL CHECK (length(message_id) = 16),
    -- How often the message was seen: 1 is the effect, the rest are absorbed repeats.
    seen         INTEGER NOT NULL DEFAULT 1 CHECK (seen >= 1),
    -- Microseconds since 1970 UTC, by this database's host; only pruning reads it.
    at           INTEGER NOT NULL,
    PRIMARY KEY (subscription, message_id)
) WITHOUT ROWID;

-- Pruning walks along time, never along the table.
CREATE INDEX handfast_inbox_at ON handfast_inbox (at);
