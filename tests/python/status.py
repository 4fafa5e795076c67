"""The status server of the producer: Handfast asks it what became of prepared messages."""

import argparse
import concurrent.futures
import logging
import signal
import time
import uuid

import grpc
import psycopg
from handfast.v1 import business_status_pb2, business_status_pb2_grpc

import fence

CHECK_S = 1.9
QUESTIONS = 100
REMEMBERS_US = (30 - 1) * 24 * 3600 * 1_000_000
NOW_US = "SELECT (extract(epoch FROM clock_timestamp()) * 1000000)::bigint"


class Status(business_status_pb2_grpc.BusinessStatusServicer):
    """Answers from the fence, on connections that the business does not use."""

    def __init__(self, database):
        self.url = database

    def Check(self, request, context):
        if len(request.questions) > QUESTIONS:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, f"at most {QUESTIONS} questions")
        ends = time.monotonic() + CHECK_S
        response = business_status_pb2.CheckResponse()
        # What fails in here fails the call, which does not count as answered.
        with psycopg.connect(self.url, autocommit=True, connect_timeout=2) as database:
            identity = fence.identity(database)
            (now_us,) = database.execute(NOW_US).fetchone()
            for question in request.questions:
                if question.fence != identity.bytes:
                    word = "UNKNOWN"
                elif question.prepared_at < now_us - REMEMBERS_US:
                    word = "UNKNOWN"
                elif time.monotonic() < ends:
                    word = fence.ask(database, uuid.UUID(bytes=question.message_id))
                else:
                    word = fence.IN_PROGRESS
                kind = business_status_pb2.VerdictKind.Value(f"VERDICT_KIND_{word}")
                response.verdicts.add(message_id=question.message_id, kind=kind)
                logging.info("%s is %s", question.message_id.hex(), word)
        return response


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--listen", required=True, metavar="HOST:PORT")
    parser.add_argument("--database", required=True, metavar="URL")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    workers = concurrent.futures.ThreadPoolExecutor(max_workers=2)
    server = grpc.server(workers, options=[("grpc.so_reuseport", 0)])
    business_status_pb2_grpc.add_BusinessStatusServicer_to_server(Status(options.database), server)
    server.add_insecure_port(options.listen)
    server.start()
    signal.signal(signal.SIGTERM, lambda *_: server.stop(grace=1))
    server.wait_for_termination()


if __name__ == "__main__":
    main()
