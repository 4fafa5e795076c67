-- What accounting writes down. Applied at every start; nothing here is ever changed or removed.

-- One voucher per payment. There is no unique key on message_id on purpose: that a payment is
-- booked once is the inbox's promise, and a breach must show instead of being hidden here.
CREATE TABLE IF NOT EXISTS voucher (
    id         INTEGER PRIMARY KEY,
    message_id BLOB    NOT NULL CHECK (length(message_id) = 16),
    -- The merchant.
    caller     TEXT    NOT NULL,
    order_id   TEXT    NOT NULL,
    user       TEXT    NOT NULL,
    -- Minor units.
    amount     INTEGER NOT NULL CHECK (amount > 0),
    -- Microseconds since 1970 UTC, by this database's host.
    at         INTEGER NOT NULL
               DEFAULT (CAST(unixepoch('now', 'subsec') * 1000000 AS INTEGER))
) STRICT;

-- The double entry. Lines are written first, under the id of the voucher that follows in the
-- same transaction; the deferred key lets no line be committed without its voucher.
CREATE TABLE IF NOT EXISTS voucher_line (
    voucher INTEGER NOT NULL REFERENCES voucher (id) DEFERRABLE INITIALLY DEFERRED,
    line    INTEGER NOT NULL,
    account TEXT    NOT NULL,
    -- Minor units; a debit is positive, a credit negative.
    amount  INTEGER NOT NULL CHECK (amount <> 0),
    PRIMARY KEY (voucher, line)
) STRICT, WITHOUT ROWID;

-- The voucher closes its lines, and here the books are checked.
CREATE TRIGGER IF NOT EXISTS voucher_balances BEFORE INSERT ON voucher
BEGIN
    SELECT raise(ABORT, 'there is a voucher of this number')
     WHERE EXISTS (SELECT 1 FROM voucher WHERE id = NEW.id);
    SELECT raise(ABORT, 'a voucher needs at least two lines')
     WHERE (SELECT count(*) FROM voucher_line WHERE voucher = NEW.id) < 2;
    SELECT raise(ABORT, 'the lines of a voucher must sum to zero')
     WHERE (SELECT sum(amount) FROM voucher_line WHERE voucher = NEW.id) <> 0;
    SELECT raise(ABORT, 'the debits of a voucher must be its amount')
     WHERE (SELECT sum(amount) FROM voucher_line WHERE voucher = NEW.id AND amount > 0)
           <> NEW.amount;
END;

CREATE TRIGGER IF NOT EXISTS voucher_line_before_voucher BEFORE INSERT ON voucher_line
BEGIN
    SELECT raise(ABORT, 'the voucher is closed')
     WHERE EXISTS (SELECT 1 FROM voucher WHERE id = NEW.voucher);
END;

CREATE TRIGGER IF NOT EXISTS voucher_stays BEFORE UPDATE ON voucher
BEGIN
    SELECT raise(ABORT, 'a voucher is never changed');
END;

CREATE TRIGGER IF NOT EXISTS voucher_is_kept BEFORE DELETE ON voucher
BEGIN
    SELECT raise(ABORT, 'a voucher is never removed');
END;

CREATE TRIGGER IF NOT EXISTS voucher_line_stays BEFORE UPDATE ON voucher_line
BEGIN
    SELECT raise(ABORT, 'a line is never changed');
END;

CREATE TRIGGER IF NOT EXISTS voucher_line_is_kept BEFORE DELETE ON voucher_line
BEGIN
    SELECT raise(ABORT, 'a line is never removed');
END;
