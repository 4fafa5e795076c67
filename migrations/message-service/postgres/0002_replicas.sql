-- Who runs on this database, and what each has heard that the others need to know.

-- One row per process, which writes it once a second and removes it when it ends in good order.
-- Nobody's right to do anything depends on it.
CREATE TABLE replica (
    id         uuid        NOT NULL PRIMARY KEY,
    version    text        NOT NULL,
    -- Where it serves.
    address    text        NOT NULL,
    started_at timestamptz NOT NULL,
    seen_at    timestamptz NOT NULL,
    -- What it holds at that moment: deliveries that it sends or has not marked SENT yet, and
    -- messages that it asks about.
    deliveries bigint      NOT NULL,
    checks     bigint      NOT NULL
) WITH (fillfactor = 50);

-- How far each subscription has come, from the answers that all processes took.
CREATE TABLE answered (
    subscription text        NOT NULL COLLATE "C" PRIMARY KEY,
    -- The latest send that was answered, where answers say of which send they are.
    through      timestamptz,
    -- When answers last came.
    answered_at  timestamptz NOT NULL
) WITH (fillfactor = 50);
