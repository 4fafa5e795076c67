-- What points writes down. Applied at every start.

-- One grant per payment, never changed or removed. There is no unique key on message_id on
-- purpose: that a payment is rewarded once is the inbox's promise, and a breach must show
-- instead of being hidden here.
CREATE TABLE IF NOT EXISTS point_grant (
    id         INTEGER PRIMARY KEY,
    message_id BLOB    NOT NULL CHECK (length(message_id) = 16),
    user       TEXT    NOT NULL,
    -- The merchant, and its number of the order.
    caller     TEXT    NOT NULL,
    order_id   TEXT    NOT NULL,
    -- 0 for a payment that is too small; that it was looked at is kept all the same.
    points     INTEGER NOT NULL CHECK (points >= 0),
    -- Microseconds since 1970 UTC, by this database's host.
    at         INTEGER NOT NULL
               DEFAULT (CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER))
) STRICT;

-- What a user has: the sum of the grants. Only a grant changes it.
CREATE TABLE IF NOT EXISTS balance (
    user   TEXT    NOT NULL PRIMARY KEY,
    points INTEGER NOT NULL CHECK (points >= 0)
) STRICT, WITHOUT ROWID;

CREATE TRIGGER IF NOT EXISTS point_grant_counts AFTER INSERT ON point_grant
BEGIN
    INSERT INTO balance (user, points)
    VALUES (NEW.user, NEW.points)
    ON CONFLICT (user) DO UPDATE SET points = points + excluded.points;
END;

CREATE TRIGGER IF NOT EXISTS point_grant_is_new BEFORE INSERT ON point_grant
BEGIN
    SELECT raise(ABORT, 'there is a grant of this number')
     WHERE EXISTS (SELECT 1 FROM point_grant WHERE id = NEW.id);
END;

CREATE TRIGGER IF NOT EXISTS point_grant_stays BEFORE UPDATE ON point_grant
BEGIN
    SELECT raise(ABORT, 'a grant is never changed');
END;

CREATE TRIGGER IF NOT EXISTS point_grant_is_kept BEFORE DELETE ON point_grant
BEGIN
    SELECT raise(ABORT, 'a grant is never removed');
END;
