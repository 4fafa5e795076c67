-- Room in each page for the next version of its rows.

-- No update of these tables is one of the heap alone, because every change of state is one of a partial index, too. All the
-- same, a new version in the page of the old one is cheaper: the WAL has only what is different, and no lock of the old row,
-- which PostgreSQL writes before it looks for another page. Of a message, that is a quarter of all WAL but its body.
--
-- A message that was prepared has one update in its life, a delivery one or two. Rows that are there already stay where they
-- are.

-- Who waits for this lock holds up nobody's rows. An autovacuum that has it is ended after `deadlock_timeout`, which is as long
-- as the wait for a lock usually is.
SET LOCAL lock_timeout = '10s';
ALTER TABLE message SET (fillfactor = 50);
ALTER TABLE delivery SET (fillfactor = 50);
