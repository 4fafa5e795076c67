-- The tables of the reference service payment. Applied at every start.

-- Balances, of users and of merchants, in minor units.
CREATE TABLE IF NOT EXISTS account (
    name    TEXT    NOT NULL PRIMARY KEY,
    balance INTEGER NOT NULL CHECK (balance >= 0)
) STRICT;

-- One row per order of a merchant: this is where repeated requests meet.
CREATE TABLE IF NOT EXISTS payment (
    caller     TEXT    NOT NULL,
    order_id   TEXT    NOT NULL,
    user       TEXT    NOT NULL,
    amount     INTEGER NOT NULL CHECK (amount > 0),
    state      TEXT    NOT NULL CHECK (state IN ('PAYING', 'PAID', 'REFUSED')),
    -- Only with REFUSED.
    reason     TEXT,
    -- The message of the transaction that paid; only with PAID.
    message_id BLOB    CHECK (message_id IS NULL OR length(message_id) = 16),
    -- Microseconds since 1970 UTC, by this database's host.
    created_at INTEGER NOT NULL,
    updated_at INTEGER NOT NULL,
    -- When the job may work on it; the job moves it forward before it does.
    due_at     INTEGER NOT NULL,
    UNIQUE (caller, order_id),
    CHECK ((state = 'REFUSED') = (reason IS NOT NULL)),
    CHECK ((state = 'PAID') = (message_id IS NOT NULL))
) STRICT;

-- The job walks along what is unfinished only.
CREATE INDEX IF NOT EXISTS payment_due ON payment (due_at) WHERE state = 'PAYING';

-- Append-only, one row per try, written before it. It has no unique key on purpose, so that
-- doubling would show; so has the next.
CREATE TABLE IF NOT EXISTS pay_try (
    try_id   BLOB    NOT NULL CHECK (length(try_id) = 16),
    caller   TEXT    NOT NULL,
    order_id TEXT    NOT NULL,
    at       INTEGER NOT NULL
) STRICT;

-- Append-only, one row per committed try, written by the transaction that pays.
CREATE TABLE IF NOT EXISTS pay_done (
    try_id     BLOB    NOT NULL CHECK (length(try_id) = 16),
    message_id BLOB    NOT NULL CHECK (length(message_id) = 16),
    caller     TEXT    NOT NULL,
    order_id   TEXT    NOT NULL,
    at         INTEGER NOT NULL
) STRICT;
