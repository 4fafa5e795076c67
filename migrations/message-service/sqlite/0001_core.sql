-- The store of the message service on SQLite. Times are microseconds since 1970 UTC by the
-- store's own clock; states are the words of the API.

-- What belongs to the store as a whole; one row.
CREATE TABLE store (
    one              INTEGER NOT NULL PRIMARY KEY CHECK (one = 1),
    -- The last time that was written. Time never goes back behind it, whatever the host says.
    last_time        INTEGER NOT NULL,
    -- The topology in force; 0 before the first.
    topology_version INTEGER NOT NULL
);
INSERT INTO store (one, last_time, topology_version) VALUES (1, 0, 0);

-- Who may prepare or publish. Names are never reused for somebody else, so rows stay.
CREATE TABLE producer (
    name            TEXT    NOT NULL PRIMARY KEY,
    -- Where Handfast asks; without it the producer may publish, not prepare.
    status_endpoint TEXT,
    check_after_ms  INTEGER NOT NULL,
    active          INTEGER NOT NULL CHECK (active IN (0, 1))
) WITHOUT ROWID;

CREATE TABLE topic (
    name                   TEXT    NOT NULL PRIMARY KEY,
    may_have_no_subscriber INTEGER NOT NULL CHECK (may_have_no_subscriber IN (0, 1)),
    active                 INTEGER NOT NULL CHECK (active IN (0, 1))
) WITHOUT ROWID;

-- Who may produce on a topic; a topic without rows is open to every producer.
CREATE TABLE topic_producer (
    topic    TEXT NOT NULL REFERENCES topic (name),
    producer TEXT NOT NULL REFERENCES producer (name),
    PRIMARY KEY (topic, producer)
) WITHOUT ROWID;

-- One consumer group on one topic. The confirm statement joins the active ones.
CREATE TABLE subscription (
    name         TEXT    NOT NULL PRIMARY KEY,
    topic        TEXT    NOT NULL REFERENCES topic (name),
    -- The whole policy as JSON: schedule_ms, attempts (null: unlimited), max_age_ms.
    policy       TEXT    NOT NULL,
    active       INTEGER NOT NULL CHECK (active IN (0, 1))
) WITHOUT ROWID;

CREATE INDEX subscription_by_topic ON subscription (topic) WHERE active = 1;

-- The narrow row of a message. A change of state never copies a payload.
CREATE TABLE message (
    id            BLOB    NOT NULL PRIMARY KEY CHECK (length(id) = 16),
    producer      TEXT    NOT NULL,
    topic         TEXT    NOT NULL,
    key           TEXT,
    state         TEXT    NOT NULL,
    -- SHA-256 over topic, key, content type, payload and sorted headers without trace context.
    content_hash  BLOB    NOT NULL,
    -- The body bucket that holds headers and payload.
    bucket        INTEGER NOT NULL,
    -- The fence identity that prepare carried.
    fence         BLOB,
    deliver_after INTEGER,
    -- When the producer is asked next; while it is being asked, when the lease ends.
    check_at      INTEGER,
    -- The lease of the check in flight. Settling repeats it.
    check_token   BLOB,
    -- Answered checks.
    checks        INTEGER NOT NULL DEFAULT 0,
    prepared_at   INTEGER NOT NULL,
    decided_at    INTEGER,
    decided_by    TEXT    CHECK (decided_by IN ('PRODUCER', 'CHECK', 'OPERATOR')),
    -- Marks for people.
    unresolved    INTEGER NOT NULL DEFAULT 0,
    conflict      INTEGER NOT NULL DEFAULT 0,
    unsubscribed  INTEGER NOT NULL DEFAULT 0,
    CHECK ((state = 'PREPARED') = (decided_at IS NULL)),
    CHECK ((decided_at IS NULL) = (decided_by IS NULL))
) WITHOUT ROWID;

-- A key is held by a message that is not CANCELLED.
CREATE UNIQUE INDEX message_by_key ON message (producer, topic, key)
    WHERE key IS NOT NULL AND state <> 'CANCELLED';
-- Claims of checks go per producer, oldest due first.
CREATE INDEX message_to_check ON message (producer, check_at) WHERE state = 'PREPARED';
-- Lists page by state and id.
CREATE INDEX message_by_state ON message (state, id);
-- Marks are rare, so their index is small.
CREATE INDEX message_marked ON message (id) WHERE unresolved = 1 OR conflict = 1 OR unsubscribed = 1;
-- Retention walks bucket by bucket.
CREATE INDEX message_by_bucket ON message (bucket, id);

-- One message for one subscription.
CREATE TABLE delivery (
    message_id    BLOB    NOT NULL CHECK (length(message_id) = 16),
    subscription  TEXT    NOT NULL,
    state         TEXT    NOT NULL,
    -- When it may be sent (PENDING), when its lease ends (PENDING with token), or when its
    -- silence is looked at (SENT). NULL once nothing is due any more.
    due_at        INTEGER,
    -- The lease of the send in flight. Settling repeats it.
    token         BLOB,
    -- Answers FAILED and sends that were passed by, since the last redrive.
    attempts      INTEGER NOT NULL DEFAULT 0,
    -- Goes up in the statement that takes the lease.
    generation    INTEGER NOT NULL DEFAULT 0,
    -- The last generation whose FAILED, LATER or REJECTED was counted.
    answered_generation INTEGER NOT NULL DEFAULT 0,
    -- Answers LATER in a row.
    laters        INTEGER NOT NULL DEFAULT 0,
    -- How often a stream ended while it held this delivery unanswered; above 0 it is sent alone.
    stream_ends   INTEGER NOT NULL DEFAULT 0,
    confirmed_at  INTEGER NOT NULL,
    first_sent_at INTEGER,
    sent_at       INTEGER,
    -- When it ended: consumed, dead or skipped.
    answered_at   INTEGER,
    last_error    TEXT,
    PRIMARY KEY (message_id, subscription)
) WITHOUT ROWID;

-- Claims go per subscription, oldest due first; what must go alone has a lane of its own.
CREATE INDEX delivery_to_send ON delivery (subscription, due_at)
    WHERE state = 'PENDING' AND stream_ends = 0;
CREATE INDEX delivery_to_send_alone ON delivery (subscription, due_at)
    WHERE state = 'PENDING' AND stream_ends > 0;
CREATE INDEX delivery_silent ON delivery (subscription, due_at) WHERE state = 'SENT';
-- max_age counts from confirm; the oldest open one is what a person asks for.
CREATE INDEX delivery_open ON delivery (subscription, confirmed_at)
    WHERE state IN ('PENDING', 'SENT');
-- Lists page by state.
CREATE INDEX delivery_by_state ON delivery (state, subscription, message_id);

-- What is rare in the life of a message; the rest of the timeline is read from columns.
CREATE TABLE message_event (
    sequence     INTEGER NOT NULL PRIMARY KEY,
    message_id   BLOB    NOT NULL,
    subscription TEXT,
    at           INTEGER NOT NULL,
    kind         TEXT    NOT NULL,
    detail       TEXT    NOT NULL DEFAULT ''
);
CREATE INDEX message_event_by_message ON message_event (message_id);

-- The body buckets: tables body_<number>, made by the store two ahead of their time. A bucket
-- holds content type, headers and payload, is only added to, and goes as a whole.
CREATE TABLE body_bucket (
    number    INTEGER NOT NULL PRIMARY KEY,
    -- From when on new bodies go here.
    opens_at  INTEGER NOT NULL
);
