"""The fence: who inserts a message's row first decides, for ever."""

import psycopg

COMMITTED, ROLLED_BACK, IN_PROGRESS = "COMMITTED", "ROLLED_BACK", "IN_PROGRESS"

BEGIN = "BEGIN; SET LOCAL synchronous_commit = on"
BEGIN_CHECK = """
    BEGIN ISOLATION LEVEL READ COMMITTED;
    SET LOCAL synchronous_commit = on;
    SET LOCAL lock_timeout = '200ms'
"""
INSERT = """
    INSERT INTO handfast_fence (message_id, verdict) VALUES (%s, %s)
    ON CONFLICT (message_id) DO NOTHING
"""
READ = "SELECT verdict FROM handfast_fence WHERE message_id = %s"
IDENTITY = "SELECT identity FROM handfast_fence_identity WHERE one = 1"
BUSY = (
    psycopg.errors.LockNotAvailable,
    psycopg.errors.SerializationFailure,
    psycopg.errors.DeadlockDetected,
)


def identity(database):
    return database.execute(IDENTITY).fetchone()[0]


def begin(database, message_id):
    """Begins a business transaction. False: a check was faster, and nothing has begun."""
    database.execute(BEGIN)
    try:
        if database.execute(INSERT, [message_id, COMMITTED]).rowcount == 1:
            return True
    except psycopg.errors.SerializationFailure:
        pass
    database.execute("ROLLBACK")
    return False


def commit(database):
    if database.execute("COMMIT").statusmessage != "COMMIT":
        raise psycopg.InternalError("a statement failed, and nothing was committed")


def ask(database, message_id):
    """What became of a transaction: final, unless it is IN_PROGRESS. An error is no verdict."""
    try:
        database.execute(BEGIN_CHECK)
        database.execute(INSERT, [message_id, ROLLED_BACK])
        # Only a second statement sees what another transaction has just committed.
        (verdict,) = database.execute(READ, [message_id]).fetchone()
        commit(database)
        return verdict
    except BUSY:
        database.execute("ROLLBACK")
        return IN_PROGRESS
