"""Frames and plain data across a pipe. Never pickle."""

import collections
import json
import os
import struct

MAX_FRAME_BYTES = 16 * 2**20


class NoAnswer(BaseException):
    """Say that no answer could be had as of a function. No `except Exception` of a test may take it for one."""


def frame(message: dict) -> bytes:
    body = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    if len(body) > MAX_FRAME_BYTES:
        raise NoAnswer(f"{len(body)} bytes of data in one call, over {MAX_FRAME_BYTES}")
    return struct.pack(">I", len(body)) + body


def write(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


def send(fd: int, message: dict) -> None:
    write(fd, frame(message))


def _read(fd: int, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        chunk = os.read(fd, min(size - len(data), 2**16))
        if not chunk:
            return None
        data += chunk
    return bytes(data)


def receive(fd: int) -> dict | None:
    """Read one frame; None at the end of the stream, NoAnswer or ValueError for what is none."""
    head = _read(fd, 4)
    if head is None:
        return None
    (size,) = struct.unpack(">I", head)
    if size > MAX_FRAME_BYTES:
        raise NoAnswer(f"{size} bytes of data in one call, over {MAX_FRAME_BYTES}")
    body = _read(fd, size)
    message = None if body is None else json.loads(body)
    if message is not None and not isinstance(message, dict):
        raise ValueError("an answer that is none")
    return message


KINDS = {"list": list, "dict": dict, "set": set, "bytearray": bytearray, "deque": collections.deque}
KEYS_VIEWS: tuple = (type({}.keys()), type({}.items()))


def pack(values: list, objects: list) -> dict:
    """Write values as JSON: mutable containers by number, so that identity, cycles and changes in place cross too.

    `objects` holds the containers that the other side knows already, by number, and gets the new ones.
    """
    numbers = {id(container): number for number, container in enumerate(objects)}

    def node(value):
        if value is None or isinstance(value, bool | str):
            return value
        if isinstance(value, int):
            return int(value) if -(2**53) < value < 2**53 else {"int": hex(value)}
        if isinstance(value, float):
            return float(value) if value - value == 0 else {"float": repr(float(value))}
        if isinstance(value, complex):
            return {"complex": [node(value.real), node(value.imag)]}
        if isinstance(value, bytes):
            return {"bytes": value.hex()}
        if isinstance(value, tuple | frozenset):
            return {"tuple" if isinstance(value, tuple) else "frozenset": [node(item) for item in value]}
        if isinstance(value, range):
            return {"range": [node(end) for end in (value.start, value.stop, value.step)]}
        if isinstance(value, tuple(KINDS.values())):
            if id(value) not in numbers:
                numbers[id(value)] = len(objects)
                objects.append(value)
            return {"object": numbers[id(value)]}
        if isinstance(value, KEYS_VIEWS):
            return {"keys": [node(item) for item in value]}
        if type(value).__module__ == "decimal" and type(value).__name__ == "Decimal":
            return {"Decimal": str(value)}
        if type(value).__module__ == "fractions" and type(value).__name__ == "Fraction":
            return {"Fraction": [node(value.numerator), node(value.denominator)]}
        if hasattr(type(value), "__next__") or isinstance(value, type({}.values())):
            return {"iterator": [node(item) for item in value]}
        raise NoAnswer(f"{type(value).__name__!r} is no plain data, as alone goes between program and tests")

    packed = [node(value) for value in values]
    contents = []
    for container in objects:  # grows on the way
        kind = next(kind for kind, cls in KINDS.items() if isinstance(container, cls))
        if kind == "bytearray":
            contents.append([kind, container.hex()])
        elif kind == "dict":
            contents.append([kind, [[node(key), node(value)] for key, value in container.items()]])
        else:
            contents.append([kind, [node(item) for item in container]])
    return {"values": packed, "objects": contents}


def unpack(data: dict, objects: list) -> list:
    """Read what `pack` wrote; containers that `objects` holds already are changed in place."""
    contents = data["objects"]
    if len(contents) < len(objects):
        raise ValueError("containers are missing")
    for container, (kind, _) in zip(objects, contents, strict=False):
        if not isinstance(container, KINDS[kind]):
            raise ValueError("a container became another")
    objects += [KINDS[kind]() for kind, _ in contents[len(objects) :]]

    def decimal(text):
        from decimal import Decimal

        return Decimal(text)

    def fraction(pair):
        from fractions import Fraction

        return Fraction(*map(value, pair))

    make: dict = {
        "int": lambda content: int(content, 16),
        "float": float,
        "complex": lambda content: complex(*map(value, content)),
        "bytes": bytes.fromhex,
        "tuple": lambda content: tuple(map(value, content)),
        "frozenset": lambda content: frozenset(map(value, content)),
        "range": lambda content: range(*map(value, content)),
        "keys": lambda content: dict.fromkeys(map(value, content)).keys(),
        "iterator": lambda content: iter([*map(value, content)]),
        "object": lambda content: objects[content],
        "Decimal": decimal,
        "Fraction": fraction,
    }

    def value(node):
        if node is None or type(node) in (bool, int, float, str):
            return node
        ((tag, content),) = node.items()
        return make[tag](content)

    for container, (kind, content) in zip(objects, contents, strict=True):
        if kind == "bytearray":
            container[:] = bytes.fromhex(content)
            continue
        items = [(value(key), value(item)) for key, item in content] if kind == "dict" else [*map(value, content)]
        container.clear()
        if kind == "dict":
            for key, item in items:
                container[key] = item
        elif kind == "set":
            container.update(items)
        else:
            container.extend(items)
    return [value(node) for node in data["values"]]
