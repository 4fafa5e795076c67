"""The producer's verbs, for lists of one item."""

import random
import time

import grpc
from google.rpc import code_pb2, error_details_pb2
from handfast.v1 import messages_pb2, messages_pb2_grpc

MAY_PASS = {
    code_pb2.CANCELLED,
    code_pb2.UNKNOWN,
    code_pb2.DEADLINE_EXCEEDED,
    code_pb2.RESOURCE_EXHAUSTED,
    code_pb2.ABORTED,
    code_pb2.INTERNAL,
    code_pb2.UNAVAILABLE,
}


class Refused(Exception):
    """What Handfast said of an item instead of its state, or of the whole call."""

    def __init__(self, of_item, code, text, details):
        super().__init__(f"{code_pb2.Code.Name(code)}: {text}")
        self.of_item, self.code = of_item, code
        self.reason, self.metadata, self.wait_s = None, {}, 0
        for detail in details:
            info, retry = error_details_pb2.ErrorInfo(), error_details_pb2.RetryInfo()
            if detail.Unpack(info) and info.domain == "handfast":
                self.reason, self.metadata = info.reason, info.metadata
            elif detail.Unpack(retry):
                self.wait_s = retry.retry_delay.ToTimedelta().total_seconds()

    def is_about(self, reason, state):
        return self.reason == reason and self.metadata["state"] == state


class Handfast:
    """The service, as one producer sees it."""

    def __init__(self, target, producer):
        self.messages = messages_pb2_grpc.MessagesStub(grpc.insecure_channel(target))
        self.producer = producer

    def prepare(self, message, seconds):
        request = messages_pb2.PrepareRequest(producer=self.producer, messages=[message])
        return self.until(self.messages.Prepare, request, seconds)

    def publish(self, message, seconds):
        request = messages_pb2.PublishRequest(producer=self.producer, messages=[message])
        return self.until(self.messages.Publish, request, seconds)

    def confirm(self, message, seconds):
        request = messages_pb2.ConfirmRequest(producer=self.producer, message_ids=[message.id])
        return self.until(self.messages.Confirm, request, seconds)

    def cancel(self, message, seconds):
        request = messages_pb2.CancelRequest(producer=self.producer, message_ids=[message.id])
        return self.until(self.messages.Cancel, request, seconds)

    def until(self, verb, request, seconds):
        """Repeats what may pass; the same id makes that safe."""
        ends, wait_s = time.monotonic() + seconds, 0.02
        while True:
            try:
                return self.once(verb, request, ends - time.monotonic())
            except Refused as refused:
                undecided = refused.is_about("KEY_HELD", "PREPARED")
                if not undecided and refused.code not in MAY_PASS:
                    raise
                pause_s = max(wait_s * random.uniform(0.5, 1), refused.wait_s)
                if time.monotonic() + pause_s >= ends:
                    raise
            time.sleep(pause_s)
            wait_s = min(2 * wait_s, 1)

    def once(self, verb, request, seconds):
        try:
            (result,) = verb(request, timeout=seconds).results
        except grpc.RpcError as error:
            raise Refused(False, error.code().value[0], error.details(), []) from error
        if result.WhichOneof("outcome") == "state":
            return result.state
        raise Refused(True, result.error.code, result.error.message, result.error.details)
