"""Every decoder of what comes from outside a process, or from files: what is valid, and what it answers to all else.

A row's `decode` is given any bytes. It returns, or raises one of `errors`: the documented ones. `module` is where it is; each
module that decodes something has a row here or a reason in `ELSEWHERE`.
"""

from __future__ import annotations

import json
import os
import socket
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import numpy as np
import torch
from safetensors.torch import save

from kvpool.arena import Arena
from kvpool.tiers.disk import journal
from kvpool.tiers.disk.journal import Entry, Journal, Removal
from kvpool.transport import tcp_frames, ucx_frames
from kvpool.transport.shm import ENDPOINT_PREFIX, ShmTransport
from kvpool.transport.tcp import TcpTransport
from protos import control, foreign_events, kv_events, tandem_pb2
from protos.control import Endpoints, Source
from protos.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, EventBatch
from router.tickets import Ticket, Tickets
from router.validation import Validator
from tandem.config import LimitsConfig, dump_config, load_config
from tandem.curve import AllowList, make_keys
from tandem.errors import ConfigError, InvalidRequest, ModelError, StorageFault, TransportError
from tandem.gguf_header import read_header
from tandem.models.gguf_weights import GGUFWeights
from tandem.models.hf_weights import HFWeights, read_config
from tandem.models.packed import packed_weights
from tandem.tokenizer.chat_template import ChatTemplate, Message
from tandem.tokenizer.tokenizer import load_tokenizer
from tandem.zmq_io import identity, parse_identity
from tests.router.fake_cluster import ByteTokenizer
from tests.tokenizer.conftest import CHATML, write_gguf, write_hf

EPOCH = b"12345678"
KEY = b"k" * 16
SLAB = 4096


@dataclass(frozen=True)
class Place:
    """A folder of the test's own."""

    folder: Path

    def file(self, name: str, data: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(data)
        return path


@dataclass(frozen=True)
class Decoder:
    name: str
    module: str
    decode: Callable[[bytes, Place], object]
    errors: tuple[type[Exception], ...]
    seeds: Callable[[Path], Sequence[bytes]]
    """Valid inputs; may use a folder."""
    examples: int = 150
    some_refused: bool = False
    """Bombs are among the seeds, or what a valid one names isn't there."""


def _fields(kind: type[msgspec.Struct]) -> dict[str, Any]:
    return {info.encode_name: _value(info.type) for info in msgspec.inspect.type_info(kind).fields}  # type: ignore[union-attr]


def _value(kind: Any) -> Any:
    match kind:
        case msgspec.inspect.IntType():
            return kind.ge or 0
        case msgspec.inspect.FloatType():
            return 1.5
        case msgspec.inspect.BoolType():
            return True
        case msgspec.inspect.StrType():
            return "x" * max(1, kind.min_length or 0)
        case msgspec.inspect.BytesType():
            return b"k" * (kind.min_length or 16)
        case msgspec.inspect.LiteralType():
            return kind.values[0]
        case msgspec.inspect.ListType():
            return [_value(kind.item_type)] * 2
        case msgspec.inspect.TupleType():
            return [_value(item) for item in kind.item_types]
        case msgspec.inspect.UnionType():
            return _value(kind.types[0])
        case msgspec.inspect.NoneType():
            return None
        case msgspec.inspect.StructType():
            values = [_value(info.type) for info in kind.fields]
            return values if kind.array_like else dict(zip([i.encode_name for i in kind.fields], values, strict=True))
        case _:
            raise AssertionError(kind)


def _messages(union: Any) -> Callable[[Path], list[bytes]]:
    return lambda folder: [
        msgspec.msgpack.encode({"t": kind.__struct_config__.tag, **_fields(kind)}) for kind in union.__args__
    ]


def _event_batches(folder: Path) -> list[bytes]:
    events = [BlockStored([KEY, 7], KEY, [1, 2], 16, medium="DEVICE"), BlockRemoved([KEY]), AllBlocksCleared()]
    return [kv_events.encode_batch(EventBatch(0.0, events, 0, EPOCH))]  # type: ignore[arg-type]


def _event_maps(folder: Path) -> list[bytes]:
    stored = {
        "type": "BlockStored",
        "block_hashes": [1],
        "parent_block_hash": None,
        "token_ids": [1, 2],
        "block_size": 2,
    }
    return [*_event_batches(folder), msgspec.msgpack.encode([0.0, [stored, {"type": "AllBlocksCleared"}]])]


# --- tickets and requests ------------------------------------------------------------------------------------------------

_tickets = Tickets(b"secret" * 8)
_ticket = Ticket(request_id="r", resume_no=0, asked=b"d" * 32, seed=1, root=KEY, tenant="t")


def _read_signed(data: bytes, place: Place) -> object:
    """What lies behind the signature, as a router that lost its mind might sign it."""
    return _tickets.read(_tickets._mac(data) + data)


def _validate(data: bytes, place: Place) -> object:
    try:
        request = tandem_pb2.GenerateRequest.FromString(data)
    except Exception as error:  # gRPC itself answers to these
        raise InvalidRequest(str(error)) from error
    validator = Validator(LimitsConfig(max_prompt_bytes=4096), ByteTokenizer(), "m")  # type: ignore[arg-type]
    asked = validator.check(request)
    return asked, validator.tokenize(request, 4096)


def _requests(folder: Path) -> list[bytes]:
    sampling = tandem_pb2.SamplingParams(max_tokens=4, temperature=0.5, top_p=0.9, stop=["x"], seed=7, n=2)
    message = tandem_pb2.ChatMessage(role="user", content="hi")
    made = [
        tandem_pb2.GenerateRequest(prompt="hello", sampling=sampling),
        tandem_pb2.GenerateRequest(chat=tandem_pb2.Chat(messages=[message])),
        tandem_pb2.GenerateRequest(token_ids=tandem_pb2.TokenIds(ids=[1, 2, 3]), idempotency_key="k"),
    ]
    return [request.SerializeToString() for request in made]


# --- models ----------------------------------------------------------------------------------------------------------------


def _tiny_config() -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"], "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8, "vocab_size": 32, "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "eos_token_id": [2], "tie_word_embeddings": True,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64},
    }  # fmt: skip


def _hf_config(data: bytes, place: Place) -> object:
    place.file("config.json", data)
    return read_config(place.folder)


def _safetensors(data: bytes, place: Place) -> object:
    place.file("config.json", json.dumps(_tiny_config()).encode())
    place.file("model.safetensors", data)
    weights = HFWeights(place.folder)
    return weights.tensor("a", (2, 3))


def _safetensors_index(data: bytes, place: Place) -> object:
    place.file("config.json", json.dumps(_tiny_config()).encode())
    (place.folder / "model.safetensors").unlink(missing_ok=True)
    place.file("model.safetensors.index.json", data)
    return HFWeights(place.folder).tensor("a", (2, 3))


def _gguf_files(folder: Path) -> list[bytes]:
    return [write_gguf(folder / "m.gguf").read_bytes()]


def _gguf_weights(data: bytes, place: Place) -> object:
    weights = GGUFWeights(place.file("m.gguf", data))
    return weights.tensor("model.embed_tokens.weight", (32, 16))


def _gguf_weight_files(folder: Path) -> list[bytes]:
    import gguf

    writer = gguf.GGUFWriter(folder / "w.gguf", "llama")
    numbers = {"block_count": 1, "context_length": 64, "embedding_length": 16, "feed_forward_length": 16}
    for key, value in (numbers | {"attention.head_count": 2, "attention.head_count_kv": 1}).items():
        writer.add_uint32(f"llama.{key}", value)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_array("tokenizer.ggml.tokens", [f"<{index}>" for index in range(32)])
    writer.add_uint32("tokenizer.ggml.eos_token_id", 2)
    writer.add_tensor("token_embd.weight", np.zeros((32, 16), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return [(folder / "w.gguf").read_bytes()]


def _hf_tokenizer_file(name: str) -> Callable[[bytes, Place], object]:
    def decode(data: bytes, place: Place) -> object:
        directory = write_hf(place.folder / "hf")
        (directory / name).write_bytes(data)
        tokenizer = load_tokenizer(directory)
        try:
            return tokenizer.encode("hello world"), tokenizer.render_chat([Message("user", "hi")])
        except InvalidRequest:
            return None  # it can't express that, or its template refuses

    return decode


def _hf_files(name: str) -> Callable[[Path], list[bytes]]:
    return lambda folder: [(write_hf(folder / "seed") / name).read_bytes()]


def _generation_config(folder: Path) -> list[bytes]:
    return [b'{"eos_token_id": [2, 3]}', b'{"eos_token_id": 2}']


def _gguf_tokenizer(data: bytes, place: Place) -> object:
    tokenizer = load_tokenizer(place.file("m.gguf", data))
    try:
        return tokenizer.encode("hello world")
    except InvalidRequest:
        return None


_TENSOR = torch.zeros(4, 4)


def _packed(data: bytes, place: Place) -> object:
    model = place.file("m", b"model")
    folder = place.folder / "packed"
    folder.mkdir(exist_ok=True)
    from tandem.models.packed import file_name

    (folder / file_name(model, "fp32")).write_bytes(data)
    found = packed_weights(model, "fp32", lambda: [("a", _TENSOR)], folder)
    assert found.tensors["a"].equal(_TENSOR), "damaged weights were believed"
    return found


def _packed_files(folder: Path) -> list[bytes]:
    from tandem.models.packed import file_name

    model = folder / "m"
    model.write_bytes(b"model")
    packed_weights(model, "fp32", lambda: [("a", _TENSOR)], folder)
    return [(folder / file_name(model, "fp32")).read_bytes()]


def _template(data: bytes, place: Place) -> object:
    return ChatTemplate(data.decode("utf-8", "replace"), bos_token="<s>", eos_token="</s>").render(
        [
            Message("system", "be kind"),
            Message("user", "hi" * 50),
            Message("assistant", "yes"),
            Message("user", "{{ x }} {% for %}"),
        ]
    )


def _templates(folder: Path) -> list[bytes]:
    return [
        CHATML.encode(),
        b"{% set n = namespace(s='a') %}{% for i in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}{{ n.s | length }}",
        b"{% macro m(x) %}{{ x | upper | replace('A', 'bb') }}{% endmacro %}{{ m(messages[0]['content'] * 3) }}",
        b"{% for m in messages if m.role == 'user' %}{{ m | tojson(indent=2) }}{% endfor %}",
        b"{% for m in messages %}{{ m.content[::-1].split() | join(', ') }}{% endfor %}",
        b"{{ '%5d|%s' % (3, 'x') }}{{ '{:>5}'.format(1) }}{{ range(50) | list | sum }}{{ (2 ** 9) // 3 }}",
    ]


# --- configuration ---------------------------------------------------------------------------------------------------------


def _config_files(folder: Path) -> list[bytes]:
    bomb = b"a: &a [x, x]\n" + b"".join(
        b"%c: &%c [*%c, *%c]\n" % (97 + i, 97 + i, 96 + i, 96 + i) for i in range(1, 25)
    )
    deep = b"router: " + b"[" * 400
    return [
        dump_config(load_config()).encode(),
        b"router: {grpc_port: 1}\n",
        bomb,
        deep,
        b"1: 2\n",
        b"cluster: " + b"9" * 5000,
    ]


def _allow_lists(folder: Path) -> list[bytes]:
    make_keys(folder / "keys")
    return [(folder / "keys" / "allowed").read_bytes()]


# --- the DISK tier -----------------------------------------------------------------------------------------------------------

_GROUP = b"g" * journal.GROUP_BYTES


def _records() -> list[Entry | Removal]:
    return [Entry(n % 8, n, 5, bytes([n]) * 16, KEY, 16, b"c" * 8, EPOCH, EPOCH) for n in range(6)] + [
        Removal(9, b"\x01" * 16)
    ]


def _journal(data: bytes, place: Place) -> object:
    place.file(journal.FILE_NAME, data)
    opened = Journal(place.folder, slab_bytes=SLAB, slots=8, group=_GROUP)
    try:
        assert len(opened.live) <= 8
        assert all(record["slot"] < 8 for record in opened.live)
        opened.append([Removal(99, KEY)])
    finally:
        opened.close()
    return None


def _journals(folder: Path) -> list[bytes]:
    opened = Journal(folder, slab_bytes=SLAB, slots=8, group=_GROUP)
    opened.append(_records())
    opened.close()
    return [(folder / journal.FILE_NAME).read_bytes()]


def _replay(data: bytes, place: Place) -> object:
    return journal.replay(data, 8)


# --- transports ----------------------------------------------------------------------------------------------------------------


def _fixed(size: int, decode: Callable[[bytes], object]) -> Callable[[bytes, Place], object]:
    """Of a frame that is read only when all of it is there."""
    return lambda data, place: decode(data[:size].ljust(size, b"\0"))


def _tcp_requests(data: bytes, place: Place) -> object:
    reader = tcp_frames.RequestReader()
    found = [request for at in range(0, len(data), 37) for request in reader.feed(data[at : at + 37])]
    assert len(reader._buffer) <= 12 + 8 * tcp_frames.MAX_LOCATIONS
    return found


def _ucx(decode: Callable[[Any], object], size: int) -> Callable[[bytes, Place], object]:
    return _fixed(size, lambda data: decode(np.frombuffer(data, dtype=np.uint8)))


def _endpoint_of(field_name: str, data: bytes) -> Source:
    text = data.decode("utf-8", "replace")[:512]
    return Source("source", EPOCH, "DEVICE", Endpoints("", "", "", machine_id="m", **{field_name: text}))


@cache
def _arena() -> Arena:
    return Arena(4, SLAB)


def _tcp_endpoint(data: bytes, place: Place) -> object:
    transport = TcpTransport(_arena(), EPOCH, "127.0.0.1", None)
    source = _endpoint_of("tcp", data)
    try:
        with patch("kvpool.transport.tcp._connect", side_effect=OSError("nobody is dialled here")):
            if transport.reaches(source):
                transport.connect(source)
    finally:
        transport.close()
    return None


class _Liar:
    """Listens where an arena should be handed out, and sends what it is told, with a descriptor or without."""

    def __init__(self) -> None:
        self.name = f"tandem-fuzz-{os.getpid()}-{threading.get_ident()}-{id(self)}"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.bind("\0" + self.name)
        self._socket.listen(8)

    def say(self, data: bytes, fds: list[int]) -> socket.socket:
        connection, _ = self._socket.accept()
        if fds:
            socket.send_fds(connection, [data or b"\0"], fds)
        elif data:
            connection.sendall(data)
        return connection

    def close(self) -> None:
        self._socket.close()


def _shm_header(data: bytes, place: Place) -> object:
    liar = _Liar()
    transport = ShmTransport(_arena(), EPOCH, "m", None)
    file = place.file("not-sealed", b"x" * SLAB).open("rb")
    try:
        for fds in ([], [_arena().fd], [file.fileno()]):
            endpoint = f"{ENDPOINT_PREFIX}{liar.name.removeprefix('tandem-')}"
            source = Source("s", EPOCH, "DEVICE", Endpoints("", "", "", shm=endpoint, machine_id="m"))
            channel = transport.connect(source)
            connection = liar.say(data[:4096], fds)
            connection.shutdown(socket.SHUT_WR)
            for _ in range(3):
                transport.poll()
            if channel.closed_because == "":  # only the truth is believed
                assert fds == [_arena().fd]
                assert data == transport._header
            channel.close()
            connection.close()
    finally:
        transport.close()
        liar.close()
        file.close()
    return None


def _shm_headers(folder: Path) -> list[bytes]:
    transport = ShmTransport(_arena(), EPOCH, "m", None)
    transport.close()
    return [transport._header]


DECODE_ERROR = (msgspec.DecodeError,)

DECODERS = [
    Decoder(
        "worker → router",
        "protos/control.py",
        lambda d, _: control.decode_to_router(d),
        DECODE_ERROR,
        _messages(control.ToRouter),
        400,
    ),
    Decoder(
        "router → worker",
        "protos/control.py",
        lambda d, _: control.decode_from_router(d),
        DECODE_ERROR,
        _messages(control.FromRouter),
        400,
    ),
    Decoder(
        "sink → source",
        "protos/control.py",
        lambda d, _: control.decode_to_source(d),
        DECODE_ERROR,
        _messages(control.ToSource),
        400,
    ),
    Decoder(
        "source → sink",
        "protos/control.py",
        lambda d, _: control.decode_to_sink(d),
        DECODE_ERROR,
        _messages(control.ToSink),
        400,
    ),
    Decoder(
        "identity", "tandem/zmq_io.py", lambda d, _: parse_identity(d), (), lambda _: [identity("decode-0", EPOCH)]
    ),
    Decoder(
        "events",
        "protos/kv_events.py",
        lambda d, _: kv_events.decode_batch(d),
        (msgspec.DecodeError, ValueError),
        _event_batches,
        400,
    ),
    Decoder(
        "sequence number",
        "protos/kv_events.py",
        lambda d, _: kv_events.decode_seq(d),
        (ValueError,),
        lambda _: [kv_events.encode_seq(5)],
    ),
    Decoder(
        "events of others",
        "protos/foreign_events.py",
        lambda d, _: foreign_events.decode_foreign_batch(d),
        (msgspec.DecodeError, ValueError),
        _event_maps,
        400,
    ),
    Decoder(
        "ticket",
        "router/tickets.py",
        lambda d, _: _tickets.read(d),
        (InvalidRequest,),
        lambda _: [_tickets.sign(_ticket)],
    ),
    Decoder(
        "ticket's inside",
        "router/tickets.py",
        _read_signed,
        (InvalidRequest,),
        lambda _: [msgspec.msgpack.encode(_ticket)],
    ),
    Decoder("request", "router/validation.py", _validate, (InvalidRequest,), _requests, 300),
    Decoder(
        "GGUF header",
        "tandem/gguf_header.py",
        lambda d, place: read_header(place.file("m.gguf", d)),
        (ModelError,),
        _gguf_files,
    ),
    Decoder("GGUF tokenizer", "tandem/tokenizer/gguf_tokenizer.py", _gguf_tokenizer, (ModelError,), _gguf_files, 80),
    Decoder("GGUF weights", "tandem/models/gguf_weights.py", _gguf_weights, (ModelError,), _gguf_weight_files),
    Decoder(
        "config.json",
        "tandem/models/hf_weights.py",
        _hf_config,
        (ModelError,),
        lambda _: [json.dumps(_tiny_config()).encode()],
        300,
    ),
    Decoder(
        "safetensors",
        "tandem/models/hf_weights.py",
        _safetensors,
        (ModelError,),
        lambda _: [save({"a": torch.zeros(2, 3)})],
    ),
    Decoder(
        "safetensors index",
        "tandem/models/hf_weights.py",
        _safetensors_index,
        (ModelError,),
        lambda _: [b'{"weight_map": {"a": "x.safetensors"}}'],
        some_refused=True,
    ),
    Decoder("packed weights", "tandem/models/packed.py", _packed, (ModelError,), _packed_files, 80),
    *(
        Decoder(name, "tandem/tokenizer/hf_tokenizer.py", _hf_tokenizer_file(name), (ModelError,), seeds, 80)
        for name, seeds in (
            ("tokenizer.json", _hf_files("tokenizer.json")),
            ("tokenizer_config.json", _hf_files("tokenizer_config.json")),
            ("generation_config.json", _generation_config),
            ("chat_template.jinja", lambda _: [CHATML.encode()]),
        )
    ),
    Decoder("chat template", "tandem/tokenizer/chat_template.py", _template, (InvalidRequest,), _templates, 300, True),
    Decoder(
        "configuration",
        "tandem/config.py",
        lambda d, place: load_config(place.file("c.yaml", d)),
        (ConfigError,),
        _config_files,
        100,
        some_refused=True,
    ),
    Decoder(
        "keys that are let in",
        "tandem/curve.py",
        lambda d, place: AllowList(place.file("allowed", d)),
        (ConfigError,),
        _allow_lists,
    ),
    Decoder(
        "journal of the DISK tier", "kvpool/tiers/disk/journal.py", _journal, (ConfigError, StorageFault), _journals
    ),
    Decoder(
        "records of the DISK tier",
        "kvpool/tiers/disk/journal.py",
        _replay,
        (),
        lambda folder: [_journals(folder)[0][journal.RECORD_BYTES :]],
    ),
    Decoder(
        "tcp hello",
        "kvpool/transport/tcp_frames.py",
        _fixed(tcp_frames.HELLO_BYTES, tcp_frames.Hello.unpack),
        (TransportError,),
        lambda _: [tcp_frames.Hello(b"s" * 16, EPOCH, SLAB).pack()],
    ),
    Decoder(
        "tcp welcome",
        "kvpool/transport/tcp_frames.py",
        _fixed(tcp_frames.WELCOME_BYTES, tcp_frames.Welcome.unpack),
        (TransportError,),
        lambda _: [tcp_frames.Welcome(EPOCH, 4, SLAB).pack()],
    ),
    Decoder(
        "tcp answer",
        "kvpool/transport/tcp_frames.py",
        _fixed(tcp_frames.ANSWER_BYTES, tcp_frames.Answer.unpack),
        (TransportError,),
        lambda _: [tcp_frames.Answer(0, 0, 3).pack()],
    ),
    Decoder(
        "tcp requests",
        "kvpool/transport/tcp_frames.py",
        _tcp_requests,
        (TransportError,),
        lambda _: [b"".join(tcp_frames.pack_request(n, np.arange(n + 1, dtype=np.uint64)) for n in range(5))],
    ),
    Decoder(
        "tcp endpoint",
        "kvpool/transport/tcp.py",
        _tcp_endpoint,
        (TransportError,),
        lambda _: [b"tcp://127.0.0.1:9/" + b"a" * 32, b"tcp://[::1]:9/" + b"a" * 32],
        some_refused=True,
    ),
    Decoder(
        "ucx greeting",
        "kvpool/transport/ucx_frames.py",
        _ucx(ucx_frames.unpack_greeting, ucx_frames.REPLY_BYTES),
        (TransportError,),
        lambda _: [ucx_frames.pack_greeting(7).tobytes()],
    ),
    Decoder(
        "ucx reply",
        "kvpool/transport/ucx_frames.py",
        _ucx(ucx_frames.unpack_reply, ucx_frames.REPLY_BYTES),
        (TransportError,),
        lambda _: [ucx_frames.pack_reply(ucx_frames.Reply(3, "no")).tobytes()],
    ),
    Decoder(
        "ucx frame",
        "kvpool/transport/ucx_frames.py",
        _ucx(ucx_frames.unpack_frame, ucx_frames.FRAME_BYTES),
        (TransportError,),
        lambda _: [
            ucx_frames.pack_ask(1, [1, 2]).tobytes(),
            ucx_frames.pack_hello(ucx_frames.Hello(b"s" * 16, EPOCH, SLAB, 9)).tobytes(),
        ],
    ),
    Decoder("shm header", "kvpool/transport/shm.py", _shm_header, (TransportError,), _shm_headers, 100),
]

ELSEWHERE = {
    "kvpool/arena.py": "views of our own memory",
    "kvpool/keys.py": "keys as numbers, of 16 bytes each by protos/control.py",
    "kvpool/sink.py": "checksums of 8 bytes each by protos/control.py",
    "kvpool/tiers/disk/io_threads.py": "checksums out of records that the journal checked",
    "kvpool/tiers/disk/segments.py": "views of our own buffers; what is read is compared with its checksum",
    "kvpool/transport/tcp_channel.py": "frames by kvpool/transport/tcp_frames.py",
    "kvpool/transport/tcp_reader.py": "frames by kvpool/transport/tcp_frames.py",
    "kvpool/transport/ucx.py": "the endpoint of a library that is off by default: tests/kvpool/test_ucx.py",
    "protos/rich_errors.py": "any bytes: tests/protos/test_rich_errors.py",
    "protos/generate.py": "a tool for developers, on our own .proto",
    "router/gateway/service.py": "JSON of a few KiB, of which one text is taken: tests/router/test_gateway.py",
    "router/http/openai/bodies.py": "bodies of HTTP, from their description and damaged: tests/router/http",
    "router/http/openai/tools.py": "what the model wrote; tools by bodies.py: tests/router/http/test_tools.py",
    "router/keyring.py": "a file that its owner alone may write: tests/router/test_keyring.py",
    "tandem/capacity/shapes.py": "a file that whoever runs the command names: tests/capacity",
    "tandem/cli/run_file.py": "a file in the user's own run folder, 4096 bytes at most: tests/cli",
    "tandem/cluster.py": "what our own actor answers to our own driver",
    "tandem/drills/model.py": "a header that tandem/gguf_header.py reads afterwards",
    "tandem/drills/spec.py": "files of this repository",
    "tandem/grammar/form.py": "llguidance reads grammars, within limits: tests/grammar",
    "tandem/grammar/matcher.py": "llguidance reads grammars, within limits: tests/grammar",
    "tandem/grammar/trial.py": "what our own process answers",
    "tandem/grammar/trial_process.py": "what the router hands its own process",
    "tandem/sim/faults/fake_model.py": "a model that the simulation makes up",
    "tandem/sim/policies/session_hash.py": "a digest as a number",
    "tandem/sim/trace.py": "a file that whoever runs the command names: tests/sim/test_trace.py",
}
"""Modules that decode something and have no row, and why that is so."""
