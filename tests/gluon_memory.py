"""What a simulated Gluon kernel touches: shared memory, barriers, registers in use, global memory, TMA descriptors."""

import math
import types

import torch


class Hazard(Exception):
    """The kernel does what the hardware leaves undefined."""


class InFlight:
    """A copy or products that will be made later; those of one queue in order."""

    def __init__(self, name: str, make, buffers: list["Buffer"] = (), queue: list | None = None):
        self.name, self.make, self.buffers, self.queue = name, make, list(buffers), queue
        self.is_made, self.value = False, None
        for buffer in self.buffers:
            buffer.readers.append(self)

    def can_be_made(self) -> bool:
        return self.queue is None or all(other.is_made for other in self.queue[: self.queue.index(self)])

    def release(self) -> None:
        for buffer in self.buffers:
            buffer.readers.remove(self)


class Barrier:
    """An mbarrier: arrivals and bytes that its phase still expects, and how many phases have completed."""

    def __init__(self, name: str, count: int):
        self.name, self.count = name, count
        self.pending, self.num_bytes, self.num_phases = count, 0, 0

    def change(self, arrivals: int, num_bytes: int) -> None:
        self.pending -= arrivals
        self.num_bytes += num_bytes
        if self.pending < 0:
            raise Hazard(f"{self.name}: more arrivals than {self.count}")
        if self.pending == 0 and self.num_bytes == 0:
            self.pending, self.num_phases = self.count, self.num_phases + 1

    def has_completed(self, parity: int) -> bool:
        """Whether the phase of this parity has: before the first phase that of parity 1 counts as completed."""
        return self.num_phases % 2 != parity


class Buffer:
    """One stage of shared memory: its content and who is using it."""

    def __init__(self, program, name: str, shape: list[int], dtype: torch.dtype):
        self.program, self.name = program, name
        self.data = torch.full(shape, math.nan, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape)
        self.num_landing, self.readers = 0, []
        self.barrier = None

    @property
    def dtype(self) -> torch.dtype:
        return self.data.dtype

    @property
    def shape(self) -> list[int]:
        return list(self.data.shape)

    def check_unused(self) -> None:
        """That nobody reads or fills this, before it is overwritten."""
        if self.readers:
            raise Hazard(f"{self.name} is overwritten while {self.readers[0].name} may still read it")
        if self.num_landing:
            raise Hazard(f"{self.name} is overwritten while a copy to it is in flight")

    def store(self, value: torch.Tensor) -> None:
        """An ordinary write, which asynchronous copies see behind a fence only."""
        self.program.pause()
        self.check_unused()
        self.data = value.clone()
        self.program.running.unfenced.add(self)

    def permute(self, order: tuple[int, int]) -> "Transposed":
        assert tuple(order) == (1, 0)
        return Transposed(self)


class Transposed:
    """A view of a buffer for the right-hand operand."""

    def __init__(self, buffer: Buffer):
        self.buffer = buffer


class SharedMemory:
    """An allocation whose first dimension counts buffers."""

    def __init__(self, program, name: str, shape: list[int], dtype: torch.dtype):
        self.shape, self.dtype = list(shape), dtype
        self.buffers = [Buffer(program, f"{name}[{index}]", shape[1:], dtype) for index in range(shape[0])]

    def index(self, index: int) -> Buffer:
        if not 0 <= index < len(self.buffers):
            raise Hazard(f"index {index} of {len(self.buffers)} buffers")
        return self.buffers[index]


class Accumulator:
    """Registers that products may still be added to: only further products and a wait may take them."""

    def __init__(self, products: InFlight):
        self.products = products

    def __getattr__(self, name: str):
        raise Hazard(f"{name} of registers whose products were not waited for")

    def _use(self, *_):
        raise Hazard("registers used before their products were waited for")

    __add__ = __radd__ = __mul__ = __rmul__ = __sub__ = __rsub__ = __getitem__ = _use


class Pointer:
    """An address of a tensor's elements."""

    def __init__(self, memory: torch.Tensor, offset=0):
        self.memory, self.offset = memory, offset

    def __add__(self, offset) -> "Pointer":
        return Pointer(self.memory, self.offset + offset)

    def locate(self, mask: torch.Tensor) -> torch.Tensor:
        """Positions of the elements that the mask lets through; all of them must exist."""
        positions = torch.as_tensor(self.offset).expand(mask.shape)[mask].long()
        if positions.numel() and not (0 <= positions.min() and positions.max() < self.memory.numel()):
            raise Hazard(f"element {positions.max()} of {self.memory.numel()}")
        return positions


class Descriptor:
    """A TMA descriptor: reads give zeros outside the matrix, writes there are dropped."""

    def __init__(self, descriptor):
        self.matrix, self.block_shape, self.dtype = descriptor.base, list(descriptor.block_shape), descriptor.base.dtype
        self.layout = None
        num_bytes = math.prod(self.block_shape) * self.dtype.itemsize
        self.block_type = types.SimpleNamespace(nbytes=num_bytes, shape=self.block_shape)
        self.nbytes = num_bytes

    def inside(self, start: list[int]) -> tuple[slice, slice]:
        sizes = zip(start, self.block_shape, self.matrix.shape, strict=True)
        return tuple(slice(min(at, limit), min(at + size, limit)) for at, size, limit in sizes)

    def read(self, start: list[int]) -> torch.Tensor:
        part, result = self.matrix[self.inside(start)], torch.zeros(self.block_shape, dtype=self.dtype)
        result[: part.shape[0], : part.shape[1]] = part
        return result

    def write(self, start: list[int], values: torch.Tensor) -> None:
        rows, columns = self.inside(start)
        self.matrix[rows, columns] = values[: rows.stop - rows.start, : columns.stop - columns.start]


def as_argument(value):
    """What a kernel gets for a launcher's argument."""
    if isinstance(value, torch.Tensor):
        return Pointer(value.view(-1))
    return Descriptor(value) if hasattr(value, "block_shape") else value
