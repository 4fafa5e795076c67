"""A consumer of `docs/guide/wire.md`: books what deliveries say into accounts, each once.

One message at a time, one transaction per message, and no other message held meanwhile. So what
came back unanswered runs alone, as the contract wants it, because everything does.
"""

import argparse
import json
import logging
import os
import signal
import time
import uuid

import pika
import pika.exceptions
import psycopg

CONSUMED, FAILED, LATER, REJECTED = "CONSUMED", "FAILED", "LATER", "REJECTED"

PREFETCH = 1
FIRST_BACKOFF_S = 0.1
REASON_CHARACTERS = 250  # at most 1,000 bytes
REMEMBERS_US = (7 - 1) * 24 * 3600 * 1_000_000
PATIENCE = dict(heartbeat=30, blocked_connection_timeout=10, socket_timeout=4)

BEGIN = """
    BEGIN ISOLATION LEVEL READ COMMITTED;
    SET LOCAL synchronous_commit = on;
    SET LOCAL lock_timeout = '2s'
"""
INBOX = """
    INSERT INTO handfast_inbox AS inbox (subscription, message_id)
    VALUES (%s, %s)
    ON CONFLICT (subscription, message_id) DO UPDATE SET seen = inbox.seen + 1
    RETURNING seen, (extract(epoch FROM clock_timestamp()) * 1000000)::bigint AS now_us
"""


class Answer(Exception):
    """An answer other than CONSUMED, after which nothing of the transaction may stay."""

    def __init__(self, word, reason=None, **more):
        super().__init__(word)
        self.word, self.more = word, more
        if reason is not None:
            self.more["reason"] = reason[:REASON_CHARACTERS]


class Consumer:
    def __init__(self, options):
        self.options = options
        self.queue = f"{options.deployment}.{options.subscription}"
        self.acknowledge = f"{options.deployment}.acknowledge"
        self.database = None
        self.backoff_s = FIRST_BACKOFF_S
        self.stopping = False

    def stop(self, *_):
        self.stopping = True

    def run(self):
        """Consumes until it is stopped. A queue or a RabbitMQ that is missing is waited for."""
        while not self.stopping:
            try:
                with self.connect() as incoming, self.connect() as outgoing:
                    self.consume(incoming, outgoing)
            except (pika.exceptions.AMQPError, OSError) as error:
                logging.warning("waiting for RabbitMQ: %r", error)
                time.sleep(self.backoff_s)
                self.backoff_s = min(2 * self.backoff_s, 2)

    def connect(self):
        parameters = pika.URLParameters(self.options.amqp)
        for name, value in PATIENCE.items():
            setattr(parameters, name, value)
        self.user = parameters.credentials.username
        return pika.BlockingConnection(parameters)

    def consume(self, incoming, outgoing):
        deliveries = incoming.channel()
        deliveries.basic_qos(prefetch_count=PREFETCH)
        answers = outgoing.channel()
        answers.confirm_delivery()
        for method, properties, body in deliveries.consume(self.queue, inactivity_timeout=0.2):
            self.backoff_s = FIRST_BACKOFF_S
            outgoing.process_data_events(0)  # its heartbeats
            if method is not None:
                self.take(deliveries, answers, method, properties, body)
            if self.stopping:
                break
        deliveries.cancel()

    def take(self, deliveries, answers, method, properties, body):
        try:
            headers = properties.headers
            message_id = uuid.UUID(properties.message_id)
            generation = int(headers["handfast-generation"])
            sent_at = int(headers["handfast-sent-at"])
            first_sent_at = int(headers["handfast-first-sent-at"])
            if headers["handfast-subscription"] != self.options.subscription:
                raise ValueError("it is for another subscription")
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            logging.error("threw away a message that is none of Handfast's: %r", error)
            deliveries.basic_reject(method.delivery_tag, requeue=False)
            return
        answer = {"message_id": str(message_id), "generation": generation, "sent_at": sent_at}
        try:
            self.apply(message_id, first_sent_at, body)
            answer["answer"] = CONSUMED
            die("committed")
        except Answer as other:
            answer.update(answer=other.word, **other.more)
        except psycopg.OperationalError as error:
            # The database's fault, not the message's. A commit that failed may have happened:
            # then the next copy finds its inbox row.
            logging.warning("the database did not take %s: %s", message_id, error)
            answer.update(answer=LATER, after_ms=1000)
        except psycopg.Error as error:
            answer.update(answer=FAILED, reason=str(error)[:REASON_CHARACTERS])
        self.answer(answers, answer)
        die("answered")
        deliveries.basic_ack(method.delivery_tag)
        logging.info("%s, generation %s: %s", message_id, generation, answer["answer"])

    def apply(self, message_id, first_sent_at, body):
        """The effect, unless it was applied before."""
        database = self.connected()
        try:
            database.execute(BEGIN)
            inbox = database.execute(INBOX, [self.options.subscription, message_id])
            seen, now_us = inbox.fetchone()
            database.execute("SET LOCAL lock_timeout TO DEFAULT")
            if seen == 1:
                if first_sent_at < now_us - REMEMBERS_US:
                    raise Answer(REJECTED, reason="older than the inbox remembers")
                self.book(database, message_id, body)
            if database.execute("COMMIT").statusmessage != "COMMIT":
                raise psycopg.InternalError("a statement failed, and nothing was committed")
        except Answer:
            database.execute("ROLLBACK")
            raise
        except BaseException:
            # Closing rolls back, too, and the connection may be of no more use.
            database.close()
            raise

    def connected(self):
        if self.database is None or self.database.closed:
            self.database = psycopg.connect(self.options.database, autocommit=True)
        return self.database

    def book(self, database, message_id, body):
        try:
            payment = json.loads(body)
            order, account, amount = payment["order"], payment["account"], int(payment["amount"])
        except (KeyError, TypeError, ValueError) as error:
            raise Answer(REJECTED, reason=f"this is no payment: {error!r}")
        found = database.execute("SELECT closed FROM account WHERE name = %s", [account]).fetchone()
        if found is None:
            raise Answer(FAILED, reason=f"there is no account `{account}`")
        if found == (True,):
            raise Answer(LATER, after_ms=500)
        database.execute(
            "INSERT INTO booking (message_id, order_id, account, amount) VALUES (%s, %s, %s, %s)",
            [message_id, order, account, amount],
        )
        database.execute(
            "UPDATE account SET balance = balance + %s WHERE name = %s", [amount, account]
        )

    def answer(self, answers, answer):
        """Returns when RabbitMQ has confirmed it; a return, a nack and a silence are errors."""
        answers.basic_publish(
            exchange="",
            routing_key=self.acknowledge,
            body=json.dumps({"subscription": self.options.subscription, "answers": [answer]}),
            properties=pika.BasicProperties(
                content_type="application/json", delivery_mode=2, user_id=self.user
            ),
            mandatory=True,
        )


def die(moment):
    """Ends as a power failure would, at the first moment of this name. For tests."""
    if os.environ.get("DIE_WHEN") == moment:
        os.kill(os.getpid(), signal.SIGKILL)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--amqp", required=True, metavar="URL")
    parser.add_argument("--deployment", default="handfast")
    parser.add_argument("--subscription", required=True)
    parser.add_argument("--database", required=True, metavar="URL")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    logging.getLogger("pika").setLevel(logging.CRITICAL)
    consumer = Consumer(options)
    signal.signal(signal.SIGTERM, consumer.stop)
    consumer.run()


if __name__ == "__main__":
    main()
