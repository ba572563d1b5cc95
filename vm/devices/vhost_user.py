"""Serves a virtio device to a vhost-user front end, which is QEMU, over a Unix socket.

QEMU's docs/interop/vhost-user.rst is the specification. QEMU is trusted as little as its guest:
one that was taken over by it may end this device, and nothing else.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

from voidbus.vm.devices.device import F_EVENT_IDX, F_INDIRECT_DESC, VirtioDevice
from voidbus.vm.devices.event_loop import EDGE, READ, EventLoop
from voidbus.vm.devices.faults import DeviceError
from voidbus.vm.devices.memory import GuestMemory, MemoryRegion
from voidbus.vm.devices.unix_listener import UnixListener
from voidbus.vm.devices.vhost_user_messages import (
    CONFIG_HEADER,
    F_PROTOCOL_FEATURES,
    FLAG_NEED_REPLY,
    MAX_CONFIG,
    MAX_REGIONS,
    NO_DESCRIPTOR,
    PROTOCOL_F_CONFIG,
    PROTOCOL_F_MQ,
    PROTOCOL_F_REPLY_ACK,
    RING_ADDRESSES,
    RING_MASK,
    RING_STATE,
    TABLE_HEADER,
    TABLE_REGION,
    U64,
    FrontEnd,
    FrontEndGone,
    Message,
    Request,
)
from voidbus.vm.devices.vhost_user_ring import Ring
from voidbus.vm.devices.virtqueue import MAX_QUEUE_SIZE, RingAddresses, Virtqueue

PROTOCOL_FEATURES = PROTOCOL_F_MQ | PROTOCOL_F_REPLY_ACK | PROTOCOL_F_CONFIG

_MESSAGES_A_TURN = 32


class VhostUserBackend:
    """The back end of one device. One front end at a time; when it goes, the device is reset and
    the next may connect.

    All of it runs on the loop's thread. A message that breaks the protocol raises DeviceError
    there, which ends the loop with the reason. When the loop ends, the socket's path is removed,
    every descriptor is closed, and so is the device.
    """

    def __init__(self, device: VirtioDevice, listen_path: Path, loop: EventLoop) -> None:
        self._device = device
        self._loop = loop
        self._listener = UnixListener(listen_path, 1, self._accept)
        self._front_end: FrontEnd | None = None
        self._features = 0
        self._protocol_features = 0
        self._memory: GuestMemory | None = None
        self._user_addresses: list[tuple[int, int, int]] = []
        self._rings = [Ring(number, size) for number, size in enumerate(device.queue_sizes)]
        self._handlers: dict[int, Callable[[Message], bytes | None]] = {
            Request.GET_FEATURES: self._get_features,
            Request.SET_FEATURES: self._set_features,
            Request.SET_OWNER: self._set_owner,
            Request.RESET_OWNER: self._reset_owner,
            Request.SET_MEM_TABLE: self._set_mem_table,
            Request.SET_VRING_NUM: self._set_vring_num,
            Request.SET_VRING_ADDR: self._set_vring_addr,
            Request.SET_VRING_BASE: self._set_vring_base,
            Request.GET_VRING_BASE: self._get_vring_base,
            Request.SET_VRING_KICK: self._set_vring_kick,
            Request.SET_VRING_CALL: self._set_vring_call,
            Request.SET_VRING_ERR: self._set_vring_err,
            Request.GET_PROTOCOL_FEATURES: self._get_protocol_features,
            Request.SET_PROTOCOL_FEATURES: self._set_protocol_features,
            Request.GET_QUEUE_NUM: self._get_queue_num,
            Request.SET_VRING_ENABLE: self._set_vring_enable,
            Request.GET_CONFIG: self._get_config,
            Request.SET_CONFIG: self._set_config,
        }

    def listen(self) -> None:
        """Bind the socket (mode 0600) and attach the device. Before the loop starts. From here
        on the loop's end releases everything. Raises OSError, ValueError (path too long)."""
        self._listener.listen(self._loop)
        self._loop.at_end(self._end)
        self._device.attach(self._loop)
        self._listener.start()

    # -- the connection -------------------------------------------------------------------

    def _accept(self, sock: socket.socket) -> None:
        self._front_end = FrontEnd(sock)
        self._listener.stop()
        self._loop.watch(sock.fileno(), READ, self._receive)

    def _receive(self, _: int) -> None:
        front_end = self._front_end
        if front_end is None:
            return
        try:
            for _turn in range(_MESSAGES_A_TURN):
                message = front_end.receive()
                if message is None:
                    return
                try:
                    self._handle(front_end, message)
                finally:
                    message.close()
        except FrontEndGone:
            self._disconnect()
            self._listener.start()

    def _disconnect(self) -> None:
        for ring in self._rings:
            self._stop(ring)
            ring.clear()
        self._device.reset()
        self._forget_memory()
        self._features = self._protocol_features = 0
        front_end, self._front_end = self._front_end, None
        if front_end is not None:
            self._loop.unwatch(front_end.fileno())
            front_end.close()

    def _end(self) -> None:
        try:
            self._disconnect()
        finally:
            self._listener.close()
            self._device.close()

    def _handle(self, front_end: FrontEnd, message: Message) -> None:
        handler = self._handlers.get(message.request)
        if handler is None:
            raise DeviceError(f"vhost-user: message {message.request} is not understood")
        answer = handler(message)
        if answer is not None:
            front_end.reply(message.request, answer)
        elif message.flags & FLAG_NEED_REPLY and self._protocol_features & PROTOCOL_F_REPLY_ACK:
            front_end.reply(message.request, U64.pack(0))

    # -- features and configuration -------------------------------------------------------

    def _get_features(self, message: Message) -> bytes:
        return U64.pack(self._device.features | F_PROTOCOL_FEATURES)

    def _set_features(self, message: Message) -> None:
        (features,) = message.unpack(U64)
        offered = self._device.features | F_PROTOCOL_FEATURES
        if features & ~offered:
            raise DeviceError(
                f"vhost-user: features {features & ~offered:#x} were taken but not offered"
            )
        if any(ring.queue is not None for ring in self._rings) and features != self._features:
            raise DeviceError("vhost-user: features change while queues run")
        # A driver without VIRTIO_F_VERSION_1 (QEMU's virtio-mmio is a legacy one unless told
        # otherwise) is no different here: the rings of a little-endian guest are the same.
        self._features = features
        if not features & F_PROTOCOL_FEATURES:
            for ring in self._rings:
                ring.enabled = True

    def _get_protocol_features(self, message: Message) -> bytes:
        return U64.pack(PROTOCOL_FEATURES)

    def _set_protocol_features(self, message: Message) -> None:
        (features,) = message.unpack(U64)
        if features & ~PROTOCOL_FEATURES:
            raise DeviceError(
                f"vhost-user: protocol features {features:#x} were taken but not offered"
            )
        self._protocol_features = features

    def _set_owner(self, message: Message) -> None:
        pass

    def _reset_owner(self, message: Message) -> None:
        for ring in self._rings:
            self._stop(ring)
            ring.clear()
        self._device.reset()

    def _get_queue_num(self, message: Message) -> bytes:
        return U64.pack(len(self._rings))

    def _get_config(self, message: Message) -> bytes:
        offset, size, flags = self._config_header(message)
        config = self._device.config()
        # A config space ends in zeros, so a front end that knows more fields reads them as such.
        content = config[offset : offset + size].ljust(size, b"\0")
        return CONFIG_HEADER.pack(offset, size, flags) + content

    def _set_config(self, message: Message) -> None:
        offset, size, _ = self._config_header(message)
        self._device.write_config(offset, message.payload[CONFIG_HEADER.size :][:size])

    def _config_header(self, message: Message) -> tuple[int, int, int]:
        if len(message.payload) < CONFIG_HEADER.size:
            raise DeviceError("vhost-user: a configuration request without its header")
        offset, size, flags = CONFIG_HEADER.unpack_from(message.payload)
        if offset + size > MAX_CONFIG or len(message.payload) != CONFIG_HEADER.size + size:
            raise DeviceError(f"vhost-user: {size} bytes of configuration at {offset}")
        return offset, size, flags

    # -- memory ---------------------------------------------------------------------------

    def _set_mem_table(self, message: Message) -> None:
        size = len(message.payload) - TABLE_HEADER.size
        count = TABLE_HEADER.unpack_from(message.payload)[0] if size >= 0 else -1
        if not 0 < count <= MAX_REGIONS or size != count * TABLE_REGION.size:
            raise DeviceError(f"vhost-user: a memory table of {len(message.payload)} bytes")
        if len(message.fds) != count:
            raise DeviceError(
                f"vhost-user: a memory table of {count} regions with {len(message.fds)} descriptors"
            )
        regions: list[MemoryRegion] = []
        addresses: list[tuple[int, int, int]] = []
        try:
            for number in range(count):
                guest, length, user, offset = TABLE_REGION.unpack_from(
                    message.payload, TABLE_HEADER.size + number * TABLE_REGION.size
                )
                regions.append(MemoryRegion.map(message.fds[number], offset, length, guest))
                addresses.append((user, length, guest))
            memory = GuestMemory(regions)
        except DeviceError:
            for region in regions:
                region.close()
            raise
        # A table sent again while queues run: they go on, in the new mapping.
        for ring in self._rings:
            self._stop(ring)
        self._forget_memory()
        self._memory, self._user_addresses = memory, addresses
        for ring in self._rings:
            self._start_if_ready(ring)

    def _forget_memory(self) -> None:
        memory, self._memory = self._memory, None
        self._user_addresses = []
        if memory is not None:
            memory.close()

    def _guest_address(self, user: int) -> int:
        for start, length, guest in self._user_addresses:
            if start <= user < start + length:
                return guest + user - start
        raise DeviceError(f"vhost-user: a ring at {user:#x}, which is not in the memory table")

    # -- rings ----------------------------------------------------------------------------

    def _ring(self, number: int) -> Ring:
        if number >= len(self._rings):
            raise DeviceError(f"vhost-user: ring {number} of {len(self._rings)}")
        return self._rings[number]

    def _stopped_ring(self, number: int) -> Ring:
        ring = self._ring(number)
        if ring.queue is not None:
            raise DeviceError(f"vhost-user: ring {number} is set up while it runs")
        return ring

    def _set_vring_num(self, message: Message) -> None:
        number, size = message.unpack(RING_STATE)
        ring = self._stopped_ring(number)
        if not 0 < size <= min(ring.max_size, MAX_QUEUE_SIZE) or size & (size - 1):
            raise DeviceError(f"vhost-user: ring {number} of size {size}")
        ring.size = size

    def _set_vring_addr(self, message: Message) -> None:
        number, _flags, descriptors, used, available, _log = message.unpack(RING_ADDRESSES)
        self._stopped_ring(number).addresses = (descriptors, available, used)

    def _set_vring_base(self, message: Message) -> None:
        number, index = message.unpack(RING_STATE)
        self._stopped_ring(number).index = index & 0xFFFF

    def _get_vring_base(self, message: Message) -> bytes:
        number, _ = message.unpack(RING_STATE)
        ring = self._ring(number)
        self._stop(ring)
        ring.stopped_at = ring.index
        ring.set_kick(None)
        return RING_STATE.pack(number, ring.index)

    def _set_vring_kick(self, message: Message) -> None:
        number, fd = self._ring_fd(message)
        if fd is None:
            raise DeviceError("vhost-user: a ring without kicks; polling is not offered")
        ring = self._ring(number)
        self._stop(ring)
        ring.set_kick(fd)
        self._start_if_ready(ring)

    def _set_vring_call(self, message: Message) -> None:
        number, fd = self._ring_fd(message)
        self._ring(number).set_call(fd)

    def _set_vring_err(self, message: Message) -> None:
        _number, fd = self._ring_fd(message)
        if fd is not None:
            os.close(fd)  # an error of ours ends the device, which the front end sees

    def _ring_fd(self, message: Message) -> tuple[int, int | None]:
        (value,) = message.unpack(U64)
        number = value & RING_MASK
        self._ring(number)
        return number, None if value & NO_DESCRIPTOR else message.take_fd()

    def _set_vring_enable(self, message: Message) -> None:
        number, enabled = message.unpack(RING_STATE)
        ring = self._ring(number)
        ring.enabled = bool(enabled)
        if enabled:
            self._start_if_ready(ring)
        else:
            self._stop(ring)

    def _start_if_ready(self, ring: Ring) -> None:
        kick, addresses, memory = ring.kick, ring.addresses, self._memory
        if ring.queue is not None or not ring.ready:
            return
        if kick is None or addresses is None or memory is None:
            return
        self._greet_driver(ring)
        descriptors, available, used = (self._guest_address(user) for user in addresses)
        queue = Virtqueue(
            memory,
            ring.size,
            RingAddresses(descriptors, available, used),
            ring.interrupt,
            event_idx=bool(self._features & F_EVENT_IDX),
            indirect=bool(self._features & F_INDIRECT_DESC),
            index=ring.index,
        )
        number = ring.number
        try:
            self._loop.watch(kick, READ | EDGE, lambda _: self._kicked(number))
        except OSError as error:
            raise DeviceError(f"vhost-user: no kick can come by this: {error}") from error
        ring.queue = queue
        self._device.queue_started(number, queue)
        self._device.queue_notified(number)

    def _kicked(self, number: int) -> None:
        # The eventfd is not read: edge-triggered, every write to it is told (epoll(7)).
        self._device.queue_notified(number)

    def _greet_driver(self, ring: Ring) -> None:
        if any(other.queue is not None for other in self._rings):
            return
        # A ring that goes on where it stopped is that of a paused machine; another place is a
        # new driver's.
        if ring.stopped_at is not None and ring.stopped_at != ring.index:
            self._device.reset()
        self._device.negotiated(self._features & self._device.features)

    def _stop(self, ring: Ring) -> None:
        queue = ring.queue
        if queue is None:
            return
        try:
            self._device.queue_stopped(ring.number)
        finally:
            ring.queue = None
            ring.index = queue.index
            if ring.kick is not None:
                self._loop.unwatch(ring.kick)
