"""A producer of `docs/guide/wire.md`: pays orders, and says so if, and only if, it paid.

Its status server is `status.py`, which may run elsewhere, with the same database.
"""

import argparse
import json
import logging
import os
import time
import uuid

import psycopg
from google.rpc import code_pb2
from handfast.v1 import messages_pb2

import fence
from verbs import MAY_PASS, Handfast, Refused

RESTARTS = 2
DEADLINE_S = 10
CONFIRM_S = 5


class RollBack(Exception):
    """The business does not want it after all."""


class Producer:
    def __init__(self, options):
        self.options = options
        self.handfast = Handfast(options.handfast, options.producer)
        self.database = psycopg.connect(options.database, autocommit=True)
        self.identity = fence.identity(self.database)

    def pay(self, order):
        """One payment and its message, together or not at all. Returns what is known of it."""
        try:
            message = self.begin(order)
        except Refused as refused:
            if refused.is_about("KEY_HELD", "CONFIRMED"):
                return "PAID BEFORE"
            raise
        message_id = uuid.UUID(bytes=message.id)
        try:
            self.business(message_id, order)
        except BaseException:
            self.database.execute("ROLLBACK")
            self.tell(message)
            raise
        try:
            fence.commit(self.database)
        except psycopg.Error as error:
            # It may have happened. Only the fence knows, and only on another connection.
            logging.warning("a commit failed: %s", error)
            self.database.close()
            self.database = psycopg.connect(self.options.database, autocommit=True)
            known = {fence.COMMITTED: "PAID", fence.ROLLED_BACK: "FAILED"}
            return known.get(self.tell(message), "UNKNOWN")
        if self.options.end == "forget":
            return "PAID"
        self.confirm(message)
        return "PAID"

    def begin(self, order):
        """Prepares a message, and begins its transaction with the fence row."""
        for _ in range(1 + RESTARTS):
            message = self.message(order)
            try:
                self.handfast.prepare(message, DEADLINE_S)
            except Refused as refused:
                if refused.is_about("WRONG_STATE", "CANCELLED"):
                    continue  # a check was faster than the reply
                raise
            if fence.begin(self.database, uuid.UUID(bytes=message.id)):
                return message
        raise RuntimeError(f"{order} was fenced {1 + RESTARTS} times before its business ran")

    def message(self, order):
        payload = dict(order=order, account=self.options.account, amount=self.options.amount)
        return messages_pb2.NewMessage(
            id=uuid7().bytes,
            topic=self.options.topic,
            key=f"order {order}",
            content_type="application/json",
            payload=(self.options.payload or json.dumps(payload)).encode(),
            fence=self.identity.bytes,
        )

    def business(self, message_id, order):
        self.database.execute(
            "INSERT INTO payment (order_id, message_id, account, amount) VALUES (%s, %s, %s, %s)",
            [order, message_id, self.options.account, self.options.amount],
        )
        if self.options.end == "roll-back":
            raise RollBack

    def confirm(self, message):
        try:
            self.handfast.confirm(message, CONFIRM_S)
        except Refused as refused:
            if refused.of_item and refused.code == code_pb2.NOT_FOUND:
                self.handfast.publish(message, CONFIRM_S)
            elif refused.code in MAY_PASS:
                logging.warning("a confirm is left to the check: %s", refused)
            else:
                logging.error("the confirm of a payment was refused: %s", refused)

    def tell(self, message):
        """Sends what the fence says; what it does not say is left to the check."""
        try:
            verdict = fence.ask(self.database, uuid.UUID(bytes=message.id))
        except psycopg.Error as error:
            logging.warning("the fence cannot be asked: %s", error)
            return None
        if verdict == fence.COMMITTED:
            self.confirm(message)
        elif verdict == fence.ROLLED_BACK:
            try:
                self.handfast.cancel(message, CONFIRM_S)
            except Refused as refused:
                logging.warning("a cancel was not accepted: %s", refused)
        return verdict


def uuid7():
    milliseconds = time.time_ns() // 1_000_000
    chance = int.from_bytes(os.urandom(10), "big")
    number = (milliseconds << 80) | chance
    number = number & ~(0xF << 76) | (0x7 << 76)
    return uuid.UUID(int=number & ~(0x3 << 62) | (0x2 << 62))


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--handfast", required=True, metavar="HOST:PORT")
    parser.add_argument("--database", required=True, metavar="URL")
    parser.add_argument("--producer", default="payment")
    parser.add_argument("--topic", default="payment.completed")
    parser.add_argument("--account", default="ada")
    parser.add_argument("--amount", type=int, default=1)
    parser.add_argument("--payload", help="send this instead of the payment")
    parser.add_argument("--end", choices=["confirm", "forget", "roll-back"], default="confirm")
    parser.add_argument("orders", nargs="+", metavar="ORDER")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    producer = Producer(options)
    for order in options.orders:
        try:
            outcome = producer.pay(order)
        except RollBack:
            outcome = "ROLLED BACK"
        print(order, outcome, flush=True)


if __name__ == "__main__":
    main()
