"""How many workers of each role are wanted, as this router has been told.

Owns the counts and their revision. A router starts nobody: whoever keeps the cluster reads the counts, acts on them, and tells
them to routers that know an older revision (docs/decisions/0029). Pure.
"""

from __future__ import annotations

from protos import tandem_pb2
from protos.control import Role
from tandem.errors import InvalidRequest

MAX_REPLICAS = 4096
MAX_REASON_CHARS = 512


class Wanted:
    """Counts by role; revision 0 is: nobody has said anything."""

    def __init__(self) -> None:
        self.prefill = 0
        self.decode = 0
        self.revision = 0
        self.reason = ""

    def as_message(self) -> tandem_pb2.Replicas:
        return tandem_pb2.Replicas(prefill=self.prefill, decode=self.decode, revision=self.revision, reason=self.reason)

    def set(self, request: tandem_pb2.SetReplicasRequest) -> None:
        """Takes what somebody wants. A revision that is not higher than ours is ignored: what we know is newer.

        Raises InvalidRequest for counts that can never be served, and for a change of one role while the other is not known.
        """
        if request.revision and request.revision <= self.revision:
            return
        prefill = request.prefill if request.HasField("prefill") else self.prefill
        decode = request.decode if request.HasField("decode") else self.decode
        if not self.revision and not (request.HasField("prefill") and request.HasField("decode")):
            raise InvalidRequest("nobody keeps this cluster's replicas yet: say both prefill and decode")
        for name, count in (("prefill", prefill), ("decode", decode)):
            if count > MAX_REPLICAS:
                raise InvalidRequest(f"{name} is {count}, the limit is {MAX_REPLICAS}")
        if decode < 1:
            raise InvalidRequest("decode is 0, must be at least 1 to serve")
        self.prefill, self.decode = prefill, decode
        self.revision = request.revision or self.revision + 1
        self.reason = request.reason[:MAX_REASON_CHARS]

    def without_one(self, role: Role, reason: str) -> None:
        """One worker of the role fewer, if anything is wanted; the last decode worker stays wanted."""
        least = 1 if role == "decode" else 0
        count = self.decode if role == "decode" else self.prefill
        if not self.revision or count <= least:
            return
        if role == "decode":
            self.decode -= 1
        else:
            self.prefill -= 1
        self.revision += 1
        self.reason = reason[:MAX_REASON_CHARS]
