-- The inbox: what makes an effect happen once though its message may come more often.

-- One row per subscription and message, inserted in the transaction of the effect. The
-- subscription is part of the key because two consumers may share a database.
CREATE TABLE handfast_inbox (
    subscription text        NOT NULL,
    message_id   uuid        NOT NULL,
    -- How often the message was seen: 1 is the effect, the rest are absorbed repeats.
    seen         bigint      NOT NULL DEFAULT 1 CHECK (seen >= 1),
    -- By this database's clock; only pruning reads it.
    at           timestamptz NOT NULL DEFAULT clock_timestamp(),
    PRIMARY KEY (subscription, message_id)
);

-- Pruning walks along time, never along the table.
CREATE INDEX handfast_inbox_at ON handfast_inbox (at);
