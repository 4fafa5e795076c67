-- The store of the message service on PostgreSQL 14 or later. Times are the database's own
-- clock; states are the words of the API. Text that is compared or sorted has collation "C", so
-- that no index depends on the operating system's idea of an alphabet.

-- What belongs to the store as a whole; one row.
CREATE TABLE store (
    one              smallint NOT NULL PRIMARY KEY CHECK (one = 1),
    -- Tells this store from every other, a restored copy excepted.
    identity         uuid     NOT NULL,
    -- The topology in force; 0 before the first.
    topology_version bigint   NOT NULL
);
INSERT INTO store (one, identity, topology_version) VALUES (1, gen_random_uuid(), 0);

-- Who may prepare or publish. Names are never reused for somebody else, so rows stay.
CREATE TABLE producer (
    name            text    COLLATE "C" NOT NULL PRIMARY KEY,
    -- Where Handfast asks; without it the producer may publish, not prepare.
    status_endpoint text,
    check_after_ms  bigint  NOT NULL,
    active          boolean NOT NULL
);

CREATE TABLE topic (
    name                   text    COLLATE "C" NOT NULL PRIMARY KEY,
    may_have_no_subscriber boolean NOT NULL,
    active                 boolean NOT NULL
);

-- Who may produce on a topic; a topic without rows is open to every producer.
CREATE TABLE topic_producer (
    topic    text COLLATE "C" NOT NULL REFERENCES topic (name),
    producer text COLLATE "C" NOT NULL REFERENCES producer (name),
    PRIMARY KEY (topic, producer)
);

-- One consumer group on one topic. The confirm statement joins the active ones.
CREATE TABLE subscription (
    name       text        COLLATE "C" NOT NULL PRIMARY KEY,
    topic      text        COLLATE "C" NOT NULL REFERENCES topic (name),
    -- The whole policy as JSON: schedule_ms, attempts (null: unlimited), max_age_ms and more.
    policy     text        NOT NULL,
    active     boolean     NOT NULL,
    -- When it last became active or inactive, or moved to this topic. Open deliveries of an
    -- inactive one, and older ones of an active one, belong to its earlier life: SKIPPED.
    changed_at timestamptz NOT NULL,
    -- False while deliveries of its earlier life may be open: a confirm that began before the
    -- change may add one after it.
    settled    boolean     NOT NULL
);

-- The join of the confirm statement.
CREATE INDEX subscription_by_topic ON subscription (topic) WHERE active;

-- The narrow row of a message. A change of state never copies a payload.
CREATE TABLE message (
    id            uuid        NOT NULL PRIMARY KEY,
    producer      text        COLLATE "C" NOT NULL,
    topic         text        COLLATE "C" NOT NULL,
    key           text        COLLATE "C",
    state         text        COLLATE "C" NOT NULL,
    -- SHA-256 over topic, key, content type, payload and sorted headers without trace context.
    content_hash  bytea       NOT NULL,
    -- The body bucket that holds headers and payload.
    bucket        bigint      NOT NULL,
    -- Bytes of payload and headers, so that a claim is bounded without reading bodies.
    body_bytes    bigint      NOT NULL,
    -- The fence identity that prepare carried.
    fence         uuid,
    deliver_after timestamptz,
    -- When the producer is asked next; while it is being asked, when the lease ends.
    check_at      timestamptz,
    -- The lease of the check in flight. Settling repeats it.
    check_token   uuid,
    -- Answered checks.
    checks        bigint      NOT NULL DEFAULT 0,
    prepared_at   timestamptz NOT NULL,
    decided_at    timestamptz,
    decided_by    text        COLLATE "C" CHECK (decided_by IN ('PRODUCER', 'CHECK', 'OPERATOR')),
    -- Marks for people.
    unresolved    boolean     NOT NULL DEFAULT false,
    conflict      boolean     NOT NULL DEFAULT false,
    unsubscribed  boolean     NOT NULL DEFAULT false,
    CHECK ((state = 'PREPARED') = (decided_at IS NULL)),
    CHECK ((decided_at IS NULL) = (decided_by IS NULL)),
    CHECK (state <> 'PREPARED' OR check_at IS NOT NULL),
    CHECK (state = 'PREPARED' OR check_token IS NULL)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.05);
-- No fillfactor: every change of state is one of a partial index too, so no update stays
-- within its page anyway.

-- A key is held by a message that is not CANCELLED.
CREATE UNIQUE INDEX message_by_key ON message (producer, topic, key)
    WHERE key IS NOT NULL AND state <> 'CANCELLED';
-- Claims of checks go per producer, oldest due first, apart from what is leased. Undecided
-- messages are counted and listed along it too.
CREATE INDEX message_to_check ON message (producer, ((check_token IS NOT NULL)::int), check_at)
    WHERE state = 'PREPARED';
-- The others are rare or none, so that these indexes are small; lists and counts use them.
-- CONFIRMED messages are listed along the primary key.
CREATE INDEX message_cancelled ON message (id) WHERE state = 'CANCELLED';
CREATE INDEX message_marked ON message (id) WHERE unresolved OR conflict OR unsubscribed;
CREATE INDEX message_unknown ON message (id)
    WHERE state NOT IN ('PREPARED', 'CONFIRMED', 'CANCELLED');

-- One message for one subscription.
CREATE TABLE delivery (
    message_id    uuid        NOT NULL,
    subscription  text        COLLATE "C" NOT NULL,
    state         text        COLLATE "C" NOT NULL,
    -- When it may be sent (PENDING), when its lease ends (PENDING with token), or when its
    -- silence is looked at (SENT). NULL once nothing is due any more.
    due_at        timestamptz,
    -- The lease of the send in flight. Settling repeats it.
    token         uuid,
    -- Answers FAILED and sends that were passed by, since the last redrive.
    attempts      bigint      NOT NULL DEFAULT 0,
    -- Goes up in the statement that takes the lease.
    generation    bigint      NOT NULL DEFAULT 0,
    -- The last generation whose FAILED, LATER or REJECTED was counted.
    answered_generation bigint NOT NULL DEFAULT 0,
    -- Answers LATER in a row.
    laters        bigint      NOT NULL DEFAULT 0,
    -- How often what carried it ended over it, unanswered; above 0 it is sent alone.
    stream_ends   bigint      NOT NULL DEFAULT 0,
    confirmed_at  timestamptz NOT NULL,
    first_sent_at timestamptz,
    sent_at       timestamptz,
    -- When it ended: consumed, dead or skipped.
    answered_at   timestamptz,
    last_error    text,
    PRIMARY KEY (message_id, subscription),
    CHECK (state NOT IN ('PENDING', 'SENT') OR (due_at IS NOT NULL AND answered_at IS NULL)),
    CHECK (state NOT IN ('CONSUMED', 'DEAD', 'SKIPPED')
           OR (due_at IS NULL AND answered_at IS NOT NULL)),
    CHECK (token IS NULL OR state NOT IN ('SENT', 'CONSUMED', 'DEAD', 'SKIPPED')),
    CHECK (state <> 'SENT' OR sent_at IS NOT NULL)
) WITH (autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.05);

-- Claims go per subscription, oldest due first, apart from what is leased; what must go alone
-- has a lane of its own.
CREATE INDEX delivery_to_send ON delivery (subscription, ((token IS NOT NULL)::int), due_at)
    WHERE state = 'PENDING' AND stream_ends = 0;
CREATE INDEX delivery_to_send_alone ON delivery (subscription, ((token IS NOT NULL)::int), due_at)
    WHERE state = 'PENDING' AND stream_ends > 0;
-- The recovery pass looks for silence.
CREATE INDEX delivery_silent ON delivery (subscription, due_at) WHERE state = 'SENT';
-- The others are rare or none; lists and counts use them. There is no index on the time of the
-- confirm: `max_age` is rare, and the store remembers when the next delivery can be too old.
CREATE INDEX delivery_dead ON delivery (subscription, message_id) WHERE state = 'DEAD';
CREATE INDEX delivery_skipped ON delivery (subscription, message_id) WHERE state = 'SKIPPED';
CREATE INDEX delivery_unknown ON delivery (message_id)
    WHERE state NOT IN ('PENDING', 'SENT', 'CONSUMED', 'DEAD', 'SKIPPED');

-- What is rare in the life of a message; the rest of the timeline is read from columns.
CREATE TABLE message_event (
    sequence     bigint      NOT NULL GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    message_id   uuid        NOT NULL,
    subscription text        COLLATE "C",
    at           timestamptz NOT NULL,
    kind         text        NOT NULL,
    detail       text        NOT NULL DEFAULT ''
);
-- The timeline of one message, and its removal.
CREATE INDEX message_event_by_message ON message_event (message_id);

-- The body buckets: tables body_<number>, made by the store two ahead of their time. A bucket
-- holds content type, headers and payload, is only added to, and goes as a whole. They are
-- plain tables: a partition could not be added or dropped without stopping every prepare.
CREATE TABLE body_bucket (
    number    bigint      NOT NULL PRIMARY KEY,
    -- From when on new bodies go here.
    opens_at  timestamptz NOT NULL,
    -- True once it is being emptied: nothing is added to it any more, however late.
    closed    boolean     NOT NULL DEFAULT false
);
