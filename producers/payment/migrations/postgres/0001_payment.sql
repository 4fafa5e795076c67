-- The tables of the reference service payment. Applied at every start.

-- Processes that start at once take turns.
SELECT pg_advisory_xact_lock(hashtextextended('payment', 0));

-- Balances, of users and of merchants, in minor units.
CREATE TABLE IF NOT EXISTS account (
    name    text   NOT NULL PRIMARY KEY,
    balance bigint NOT NULL CHECK (balance >= 0)
);

-- One row per order of a merchant: this is where repeated requests meet.
CREATE TABLE IF NOT EXISTS payment (
    caller     text   NOT NULL,
    order_id   text   NOT NULL,
    "user"     text   NOT NULL,
    amount     bigint NOT NULL CHECK (amount > 0),
    state      text   NOT NULL CHECK (state IN ('PAYING', 'PAID', 'REFUSED')),
    -- Only with REFUSED.
    reason     text,
    -- The message of the transaction that paid; only with PAID.
    message_id uuid,
    -- Microseconds since 1970 UTC, by this database's clock.
    created_at bigint NOT NULL,
    updated_at bigint NOT NULL,
    -- When the job may work on it; the job moves it forward before it does.
    due_at     bigint NOT NULL,
    UNIQUE (caller, order_id),
    CHECK ((state = 'REFUSED') = (reason IS NOT NULL)),
    CHECK ((state = 'PAID') = (message_id IS NOT NULL))
);

-- The job walks along what is unfinished only.
CREATE INDEX IF NOT EXISTS payment_due ON payment (due_at) WHERE state = 'PAYING';

-- Append-only, one row per try, written before it. It has no unique key on purpose, so that
-- doubling would show; so has the next.
CREATE TABLE IF NOT EXISTS pay_try (
    try_id   uuid   NOT NULL,
    caller   text   NOT NULL,
    order_id text   NOT NULL,
    at       bigint NOT NULL
);

-- Append-only, one row per committed try, written by the transaction that pays.
CREATE TABLE IF NOT EXISTS pay_done (
    try_id     uuid   NOT NULL,
    message_id uuid   NOT NULL,
    caller     text   NOT NULL,
    order_id   text   NOT NULL,
    at         bigint NOT NULL
);
