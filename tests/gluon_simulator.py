"""Runs the Python source of a Gluon kernel for Hopper without a GPU, under a random schedule.

A kernel's functions are executed as they are written, with ``gl``, ``tma``, ``mbarrier`` and the warpgroup products
replaced by the classes below and those of gluon_memory.py. Partitions are threads of which one runs at a time; at every
primitive the next one is drawn at random, and so are the moments at which copies land and products are made. What the
hardware leaves undefined raises ``Hazard``: shared memory read before its copy landed or overwritten before products
and stores that read it were waited for, registers used before their products were, more arrivals than a barrier counts,
ordinary writes and new barriers met by asynchronous copies without a fence. Where nothing can go on, ``Deadlock`` names
what is waited for.

Layouts mean nothing here, and a warpgroup is one thread: whether its four warps agree is the compiler's matter (it
synchronises them before an arrival). Programs of a grid run one after the other.
"""

import itertools
import math
import random
import threading
import types

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia import hopper

from tests.gluon_memory import (
    Accumulator,
    Barrier,
    Buffer,
    Descriptor,
    Hazard,
    InFlight,
    Pointer,
    SharedMemory,
    Transposed,
    as_argument,
)


class Deadlock(Exception):
    """No partition can go on and nothing is in flight."""


class Stopped(BaseException):
    """Ends the threads of a program whose outcome is known."""


def simulate(kernel, grid: int, arguments: tuple, constants: dict, seed: int) -> None:
    """Run all programs of a kernel; tensors become pointers, descriptors of matrices TMA descriptors."""
    for program in range(grid):
        Program(kernel, (program, grid), random.Random(f"{seed} {program}")).run(arguments, constants)


class Partition:
    """One thread of execution: what it waits for, its products and its stores."""

    def __init__(self, name: str):
        self.name, self.turn = name, threading.Semaphore(0)
        self.is_ready, self.waits_for, self.is_done = (lambda: True), "", False
        self.products, self.stores = [], []
        self.unfenced = set()


class Program:
    """One program of a grid, and what stands for the modules that its kernel imports."""

    def __init__(self, kernel, place: tuple[int, int], rng: random.Random):
        self.place, self.rng = place, rng
        self.partitions, self.in_flight, self.error = [Partition("first")], [], None
        self.running = self.partitions[0]
        # Some schedules have slow copies, some slow products, some a slow partition.
        paced = ("copy", "products", "first", "worker 1", "worker 2")
        self.pace = {name: rng.choice((0.03, 1.0, 1.0, 30.0)) for name in paced}
        self.names = itertools.count()
        self.functions = {}
        self.stand_ins = (
            (gl, Language(self)),
            (hopper.tma, Tma(self)),
            (hopper.mbarrier, Mbarrier(self)),
            (hopper.warpgroup_mma, self.warpgroup_mma),
            (hopper.warpgroup_mma_wait, self.warpgroup_mma_wait),
            (hopper.fence_async_shared, self.fence_async_shared),
        )
        self.kernel = self._as_python(kernel)

    def _as_python(self, function):
        """The function's code with every name that it reads replaced by its stand-in."""
        plain = function.fn
        if plain not in self.functions:
            scope = {}
            self.functions[plain] = types.FunctionType(
                plain.__code__, scope, plain.__name__, plain.__defaults__, plain.__closure__
            )
            scope |= {name: self._stand_in(value) for name, value in plain.__globals__.items()}
        return self.functions[plain]

    def _stand_in(self, value):
        if isinstance(value, gl.constexpr):
            return value.value
        if hasattr(value, "fn") and hasattr(value, "arg_names"):
            return self._as_python(value)
        return next((stand_in for original, stand_in in self.stand_ins if value is original), value)

    def run(self, arguments: tuple, constants: dict) -> None:
        """Execute the program on this thread and one for every worker partition."""
        try:
            self.kernel(*map(as_argument, arguments), **constants)
            self.wait_until(lambda: not self.in_flight, "copies and products in flight at the end")
            for partition in self.partitions:
                if partition.products or partition.stores:
                    raise Hazard(f"{partition.name} ends before what it started was waited for")
        except Stopped:
            pass
        except Exception as error:
            self.stop(error)
        if self.error is not None:
            raise self.error

    def stop(self, error: Exception) -> None:
        """Remember the first error and let every thread end."""
        self.error = self.error or error
        for partition in self.partitions:
            partition.turn.release()

    # Scheduling

    def pause(self) -> None:
        """Let somebody else run, or the caller again, and let what is in flight be made."""
        own = self.running
        while True:
            ready = [each for each in self.partitions if not each.is_done and each.is_ready()]
            flying = [each for each in self.in_flight if each.can_be_made()]
            if not ready and not flying:
                waits = [f"{each.name} for {each.waits_for}" for each in self.partitions if not each.is_done]
                raise Deadlock("; ".join(waits))
            weights = [self.pace[each.name] for each in ready] + [self.pace[each.name] for each in flying]
            chosen = self.rng.choices(ready + flying, weights)[0]
            if isinstance(chosen, InFlight):
                chosen.value, chosen.is_made = chosen.make(), True
                self.in_flight.remove(chosen)
                continue
            self.running = chosen
            if chosen is not own:
                chosen.turn.release()
                if own.is_done:
                    return
                own.turn.acquire()
                if self.error is not None:
                    raise Stopped
            return

    def wait_until(self, is_ready, waits_for: str) -> None:
        own = self.running
        own.is_ready, own.waits_for = is_ready, waits_for
        self.pause()
        own.is_ready, own.waits_for = (lambda: True), ""

    def start(self, name: str, make, buffers: list[Buffer] = (), queue: list | None = None) -> InFlight:
        one = InFlight(name, make, buffers, queue)
        self.in_flight.append(one)
        if queue is not None:
            queue.append(one)
        return one

    def settle(self, queue: list, num_left: int) -> None:
        """Wait for all but the newest of a queue; what they read may be overwritten then."""
        settled = queue[: max(len(queue) - num_left, 0)]
        self.wait_until(lambda: all(each.is_made for each in settled), "what it started")
        for each in settled:
            each.release()
            queue.remove(each)

    def warp_specialize(self, functions_and_args, worker_num_warps, worker_num_regs) -> None:
        """Run the partitions; the first one's results are not needed by these kernels."""
        assert len(functions_and_args) == len(worker_num_warps) + 1 == len(worker_num_regs) + 1
        workers = [Partition(f"worker {index}") for index in range(1, len(functions_and_args))]
        threads = []
        for worker, (function, arguments) in zip(workers, functions_and_args[1:], strict=True):
            threads.append(threading.Thread(target=self._work, args=(worker, function, arguments), daemon=True))
            threads[-1].start()
        self.partitions += workers
        function, arguments = functions_and_args[0]
        function(*arguments)
        self.wait_until(lambda: all(worker.is_done for worker in workers), "the workers' end")
        for thread in threads:
            thread.join()

    def _work(self, partition: Partition, function, arguments: tuple) -> None:
        partition.turn.acquire()
        try:
            if self.error is None:
                function(*arguments)
                partition.is_done = True
                self.pause()
        except Stopped:
            pass
        except Exception as error:
            self.stop(error)

    # Primitives

    def fence_async_shared(self) -> None:
        self.running.unfenced.clear()
        self.pause()

    def warpgroup_mma(self, left: Buffer, right: Transposed, sums, *, is_async: bool) -> Accumulator:
        self.pause()
        queue = self.running.products
        for buffer in (left, right.buffer):
            if buffer.num_landing or buffer.data.isnan().all():
                raise Hazard(f"{buffer.name} is read before its copy has landed")
        before = sums.products if isinstance(sums, Accumulator) else None

        def multiply() -> torch.Tensor:
            return (sums if before is None else before.value) + left.data.float() @ right.buffer.data.float().T

        products = self.start("products", multiply, [left, right.buffer], queue)
        return Accumulator(products) if is_async else self.warpgroup_mma_wait(0, [Accumulator(products)])

    def warpgroup_mma_wait(self, num_outstanding: int, deps: list):
        (sums,) = deps
        self.settle(self.running.products, num_outstanding)
        return sums if sums.products in self.running.products else sums.products.value


class Mbarrier:
    """Stands for ``mbarrier``."""

    def __init__(self, program: Program):
        self.program = program

    @staticmethod
    def MBarrierLayout() -> None:
        return None

    def init(self, place: Buffer, count: int) -> None:
        place.barrier = Barrier(place.name, count)
        self.program.running.unfenced.add(place)

    def wait(self, place: Buffer, phase: int, pred: bool = True) -> None:
        if pred:
            assert phase in (0, 1)
            self.program.wait_until(lambda: place.barrier.has_completed(phase), f"phase {phase} of {place.name}")

    def expect(self, place: Buffer, num_bytes: int) -> None:
        self.program.pause()
        place.barrier.change(1, num_bytes)

    def arrive(self, place: Buffer, *, count: int = 1, pred: bool = True) -> None:
        self.program.pause()
        if pred:
            place.barrier.change(count, 0)


class Tma:
    """Stands for ``tma``."""

    def __init__(self, program: Program):
        self.program = program

    def _check_fenced(self, buffer: Buffer) -> None:
        if any(buffer in partition.unfenced for partition in self.program.partitions):
            raise Hazard(f"{buffer.name} meets an asynchronous copy without a fence")

    def async_copy_global_to_shared(self, descriptor: Descriptor, start: list[int], place: Buffer, buffer: Buffer):
        self.program.pause()
        assert buffer.shape == descriptor.block_shape and buffer.dtype == descriptor.dtype
        self._check_fenced(place)
        buffer.check_unused()
        buffer.data = torch.full_like(buffer.data, math.nan)
        buffer.num_landing += 1

        def land() -> None:
            buffer.data = descriptor.read(start)
            buffer.num_landing -= 1
            place.barrier.change(0, -descriptor.nbytes)

        self.program.start("copy", land)

    def async_copy_shared_to_global(self, descriptor: Descriptor, start: list[int], buffer: Buffer):
        self.program.pause()
        assert buffer.shape == descriptor.block_shape
        self._check_fenced(buffer)
        self.program.start(
            "copy", lambda: descriptor.write(start, buffer.data), [buffer], self.program.running.stores
        )

    def store_wait(self, num_pending: int) -> None:
        self.program.settle(self.program.running.stores, num_pending)


class Language:
    """Stands for ``gl``: tensors are torch's, layouts nothing."""

    float32, int32, int64 = torch.float32, torch.int32, torch.int64
    constexpr, static_range = None, range
    exp2, floor, abs, where = torch.exp2, torch.floor, torch.abs, torch.where

    def __init__(self, program: Program):
        self.program = program
        self.warp_specialize = program.warp_specialize

    @staticmethod
    def SliceLayout(*_) -> None:
        return None

    NVMMADistributedLayout = SliceLayout

    def program_id(self, axis: int) -> int:
        return self.program.place[0]

    def num_programs(self, axis: int) -> int:
        return self.program.place[1]

    def allocate_shared_memory(self, dtype: torch.dtype, shape: list[int], layout: None) -> SharedMemory:
        return SharedMemory(self.program, f"memory {next(self.program.names)}", shape, dtype)

    @staticmethod
    def cdiv(value: int, divisor: int) -> int:
        return -(-value // divisor)

    @staticmethod
    def cast(value: int, dtype: torch.dtype) -> int:
        return value

    @staticmethod
    def arange(start: int, end: int, layout: None) -> torch.Tensor:
        return torch.arange(start, end, dtype=torch.int32)

    @staticmethod
    def zeros(shape: list[int], dtype: torch.dtype, layout: None) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype)

    @staticmethod
    def max(values: torch.Tensor, axis: int) -> torch.Tensor:
        return values.amax(axis)

    @staticmethod
    def sum(values: torch.Tensor, axis: int) -> torch.Tensor:
        return values.sum(axis)

    @staticmethod
    def minimum(left: int, right: int) -> int:
        return min(left, right)

    @staticmethod
    def maximum(left: torch.Tensor, right: float) -> torch.Tensor:
        return left.clamp(min=right)

    @staticmethod
    def split(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return values[..., 0], values[..., 1]

    @staticmethod
    def load(pointer: Pointer, mask: torch.Tensor, other: float) -> torch.Tensor:
        result = torch.full(mask.shape, other, dtype=pointer.memory.dtype)
        result[mask] = pointer.memory[pointer.locate(mask)]
        return result

    @staticmethod
    def store(pointer: Pointer, value: torch.Tensor, mask: torch.Tensor) -> None:
        pointer.memory[pointer.locate(mask)] = value[mask]
