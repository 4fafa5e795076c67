-- What points writes down. Applied once.

-- One grant per payment, never changed or removed. There is no unique key on message_id on
-- purpose: that a payment is rewarded once is the inbox's promise, and a breach must show
-- instead of being hidden here.
CREATE TABLE point_grant (
    id         bigint NOT NULL GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    message_id uuid   NOT NULL,
    "user"     text   NOT NULL,
    -- The merchant, and its number of the order.
    caller     text   NOT NULL,
    order_id   text   NOT NULL,
    -- 0 for a payment that is too small; that it was looked at is kept all the same.
    points     bigint NOT NULL CHECK (points >= 0),
    -- Microseconds since 1970 UTC, by this database.
    at         bigint NOT NULL
               DEFAULT ((extract(epoch FROM clock_timestamp()) * 1000000)::bigint)
);

-- What a user has: the sum of the grants. Only a grant changes it.
CREATE TABLE balance (
    "user" text   NOT NULL PRIMARY KEY,
    points bigint NOT NULL CHECK (points >= 0)
);

CREATE FUNCTION point_grant_counts() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    INSERT INTO balance ("user", points)
    VALUES (NEW."user", NEW.points)
    ON CONFLICT ("user") DO UPDATE SET points = balance.points + excluded.points;
    RETURN NULL;
END $$;

CREATE TRIGGER point_grant_counts AFTER INSERT ON point_grant
   FOR EACH ROW EXECUTE FUNCTION point_grant_counts();

CREATE FUNCTION point_grant_stays() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    RAISE EXCEPTION 'a grant is never %',
        CASE TG_OP WHEN 'UPDATE' THEN 'changed' ELSE 'removed' END;
END $$;

CREATE TRIGGER point_grant_stays BEFORE UPDATE OR DELETE OR TRUNCATE ON point_grant
   FOR EACH STATEMENT EXECUTE FUNCTION point_grant_stays();
