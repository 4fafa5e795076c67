-- What accounting writes down. Applied once; nothing here is ever changed or removed.

-- Numbers of vouchers. Several transactions write at once, and one that is rolled back leaves a
-- gap.
CREATE SEQUENCE voucher_number;

-- One voucher per payment. There is no unique key on message_id on purpose: that a payment is
-- booked once is the inbox's promise, and a breach must show instead of being hidden here.
CREATE TABLE voucher (
    id         bigint NOT NULL PRIMARY KEY,
    message_id uuid   NOT NULL,
    -- The merchant.
    caller     text   NOT NULL,
    order_id   text   NOT NULL,
    "user"     text   NOT NULL,
    -- Minor units.
    amount     bigint NOT NULL CHECK (amount > 0),
    -- Microseconds since 1970 UTC, by this database.
    at         bigint NOT NULL
               DEFAULT ((extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
);

-- The double entry. Lines are written first, under the id of the voucher that follows in the
-- same transaction; the deferred key lets no line be committed without its voucher.
CREATE TABLE voucher_line (
    voucher bigint  NOT NULL REFERENCES voucher (id) DEFERRABLE INITIALLY DEFERRED,
    line    integer NOT NULL,
    account text    NOT NULL,
    -- Minor units; a debit is positive, a credit negative.
    amount  bigint  NOT NULL CHECK (amount <> 0),
    PRIMARY KEY (voucher, line)
);

-- The voucher closes its lines, and here the books are checked.
CREATE FUNCTION voucher_balances() RETURNS trigger LANGUAGE plpgsql AS $$
DECLARE
    lines   bigint;
    total   numeric;
    debits  numeric;
BEGIN
    SELECT count(*), coalesce(sum(amount), 0), coalesce(sum(amount) FILTER (WHERE amount > 0), 0)
      INTO lines, total, debits
      FROM voucher_line
     WHERE voucher = NEW.id;
    IF lines < 2 THEN
        RAISE EXCEPTION 'a voucher needs at least two lines';
    ELSIF total <> 0 THEN
        RAISE EXCEPTION 'the lines of a voucher must sum to zero';
    ELSIF debits <> NEW.amount THEN
        RAISE EXCEPTION 'the debits of a voucher must be its amount';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER voucher_balances BEFORE INSERT ON voucher
   FOR EACH ROW EXECUTE FUNCTION voucher_balances();

CREATE FUNCTION voucher_line_before_voucher() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF EXISTS (SELECT 1 FROM voucher WHERE id = NEW.voucher) THEN
        RAISE EXCEPTION 'the voucher is closed';
    END IF;
    RETURN NEW;
END $$;

CREATE TRIGGER voucher_line_before_voucher BEFORE INSERT ON voucher_line
   FOR EACH ROW EXECUTE FUNCTION voucher_line_before_voucher();

CREATE FUNCTION refuse_change() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'a % is never %', TG_ARGV[0],
        CASE TG_OP WHEN 'UPDATE' THEN 'changed' ELSE 'removed' END;
END $$;

CREATE TRIGGER voucher_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON voucher
   FOR EACH STATEMENT EXECUTE FUNCTION refuse_change('voucher');

CREATE TRIGGER voucher_line_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON voucher_line
   FOR EACH STATEMENT EXECUTE FUNCTION refuse_change('line');
