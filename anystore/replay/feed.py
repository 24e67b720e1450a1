"""Batches for a learner: sampled ahead on a thread, and handed over in the arrays that the learner works with.

All that is asked of a buffer is a method ``sample(batch_size, **options)``, for passes ``one_pass`` of the same
arguments. If it has a `backend` as well, the thread works on the stream that is current where the learner is.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import importlib
import inspect
import itertools
import os
import queue
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from anystore.convert import is_array, to_numpy
from anystore.handover import hand_over_batch, to_library
from anystore.nests import children
from anystore.specs import as_count

_LAST_WAIT = 10.0
"""The seconds that the end of the program waits for a sample that is being drawn."""


class Batches(Iterator[Any]):
    """An iterator of samples, drawn ahead on a thread while the learner works.

    Parameters
    ----------
    buffer : ReplayBuffer
        Whose `sample` to call; it is called from the thread, and must allow for that.
    batch_size : int
        The first argument of `sample`.
    prefetch : int, default 2
        How many batches are drawn ahead. 0: none, and there is no thread.
    to : {"numpy", "torch", "jax", "tensorflow", "cupy"}, optional
        The library whose arrays to hand over; None stands for the buffer's own. `Sample.rows`, which go back to the
        buffer, stay in its own.
    copy : bool or None, default None
        As in `to_library`; None shares memory where that takes less time than a copy: JAX has small arrays copied, all
        of a batch in one call, which is compiled for each new shape.
    device : str or device object, optional
        As in `to_library`, with `to`: where to hand the arrays over, by default where the buffer has them.
    count : int, optional
        How many batches there are; None for no end.
    passes : int, optional
        How often every item comes once, in the batches of ``buffer.one_pass``, of which the last one may be smaller.
        None stands for samples.
    **options
        The other arguments of `sample`.

    Raises
    ------
    ValueError
        If `prefetch`, `count` or `passes` is no integer of 0 or more, `to` is no library that is known or lacks the
        device.
    ImportError
        If the library is not installed.
    TypeError
        If `sample` takes no such options.
    RuntimeError
        From `next` in a process that was forked off when the thread was at work, which is left behind then.

    Notes
    -----
    The thread starts with the first `next`. A batch is as the buffer was when it was drawn: up to ``prefetch`` batches
    before the learner sees it. What `sample` raises on the thread is raised by `next`, with its traceback and after the
    batches that were drawn before; then there are no more.

    The thread ends with the last batch, with `close`, at the end of a ``with``, when nothing refers to the iterator any
    more (as after a ``break`` out of a loop over it), and with the program. Several threads may share one iterator. A
    thread that holds the buffer's `lock` must call neither `next` nor `close`: the one that draws may wait for it.

    On a GPU everything is as if the learner itself had called `sample` instead of its first `next`: draws are made on
    the stream that is current for the buffer's library then and there, and nothing waits for them. A learner that uses
    the batches on another stream than that lets it wait. Another library (`to`) takes them over in `next`, so that they
    are ready for its own current stream.

    Examples
    --------
    >>> import numpy as np
    >>> from anystore.replay.feed import Batches
    >>> class Numbers:
    ...     def sample(self, batch_size):
    ...         return np.arange(batch_size)
    >>> with Batches(Numbers(), 3, count=2) as batches:
    ...     for batch in batches:
    ...         print(batch)
    [0 1 2]
    [0 1 2]
    """

    def __init__(
        self,
        buffer: Any,
        batch_size: int,
        *,
        prefetch: int = 2,
        to: str | None = None,
        copy: bool | None = None,
        device: Any = None,
        count: int | None = None,
        passes: int | None = None,
        **options: Any,
    ) -> None:
        prefetch = as_count("prefetch", prefetch, 0)
        turns = itertools.repeat(None) if count is None else itertools.repeat(None, as_count("count", count, 0))
        method = buffer.sample if passes is None else buffer.one_pass
        inspect.signature(method).bind(batch_size, **options)  # refuses what `sample` does not take, at once
        draw: Callable[[], Any] = functools.partial(method, batch_size, **options)
        if passes is not None:
            draw = _Passes(draw, as_count("passes", passes, 0))
        self._hand_over: Callable[[Any], Any] | None = None
        check_target(to, device)
        if to is not None:
            handed = functools.partial(hand_over, library=to, copy=copy, device=device)
            if _is_on_gpu(buffer):
                self._hand_over = handed
            else:
                draw = functools.partial(_drawn, draw, handed)
        self._source: _Ahead | _InTurn
        if prefetch == 0:
            self._source = _InTurn(draw, turns)
        else:
            self._source = _Ahead(draw, turns, prefetch, getattr(buffer, "backend", None))
            # Nothing more than a word to the thread: whoever drops the last reference may hold the buffer's lock.
            weakref.finalize(self, self._source.stop).atexit = False

    def __iter__(self) -> Batches:
        return self

    def __next__(self) -> Any:
        batch = self._source.next()
        return batch if self._hand_over is None else self._hand_over(batch)

    def close(self) -> None:
        """End the thread, and wait until it has ended; there are no more batches then. Idempotent."""
        self._source.close()

    def __enter__(self) -> Batches:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


class _Passes:
    """The batches of several passes, one at each call; after the last one `StopIteration` is raised."""

    def __init__(self, begin: Callable[[], Iterator[Any]], count: int) -> None:
        self._batches = itertools.chain.from_iterable(begin() for _ in range(count))
        self._lock = threading.Lock()  # which an iterator lacks

    def __call__(self) -> Any:
        with self._lock:
            return next(self._batches)


class _InTurn:
    """Batches that are drawn when they are asked for."""

    def __init__(self, draw: Callable[[], Any], turns: Iterator[None]) -> None:
        self._draw = draw
        self._turns = turns

    def next(self) -> Any:
        next(self._turns)
        try:
            return self._draw()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        self._turns = iter(())


@dataclasses.dataclass(frozen=True)
class _End:
    """What comes after the last batch."""

    error: BaseException | None = None


class _Ahead:
    """Batches that a thread draws, until so many are ready; whoever takes one wakes it.

    It holds no reference to the iterator, whose end it must not delay. What the threads share are two queues of the
    kind that may be put to anywhere, also while garbage is collected. That it was woken says nothing but that it is to
    look again, so that an interrupt of who takes a batch, once the thread runs, can cost that batch and no more.
    """

    def __init__(self, draw: Callable[[], Any], turns: Iterator[None], prefetch: int, backend: Any) -> None:
        self._draw = draw
        self._turns = turns
        self._backend = backend
        self._prefetch = prefetch
        self._wake_ups: queue.SimpleQueue[None] = queue.SimpleQueue()
        self._ready: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._stopped = False
        self._starting = threading.RLock()
        self._thread: threading.Thread | None = None
        self._process: int | None = None

    def next(self) -> Any:
        if self._thread is None or self._thread.ident is None:
            self._start()
        if self._process != os.getpid():  # a fork leaves the thread behind, and there would be no end of waiting
            raise RuntimeError("the batches are drawn by a thread of the parent process; make new ones in this process")
        self._wake_ups.put(None)  # which the last one may not have come to, if it was interrupted
        batch = self._ready.get()
        if not isinstance(batch, _End):
            self._wake_ups.put(None)
            return batch
        self._ready.put(_End())  # for the next one that asks
        try:
            raise StopIteration if batch.error is None else batch.error
        finally:
            del batch  # or the error would hold itself, by its traceback

    def stop(self) -> None:
        """Let the thread end when it has drawn the batch that it draws, if any, and do not wait for it."""
        self._stopped = True
        self._wake_ups.put(None)

    def close(self) -> None:
        self.stop()
        with self._starting:
            thread = self._thread
        if thread is not None and thread.ident is not None and thread is not threading.current_thread():
            thread.join()
        with contextlib.suppress(queue.Empty):
            while True:
                self._ready.get_nowait()
        self._ready.put(_End())

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                stream = contextlib.nullcontext() if self._backend is None else self._backend.stream()
                self._thread = threading.Thread(target=self._run, args=(stream,), name="anystore-batches", daemon=True)
            if self._thread.ident is None:
                # For each thread anew: what was registered last is called first, before the libraries clean up.
                atexit.register(self._stop_at_exit, self._thread)
                self._process = os.getpid()
                self._thread.start()

    def _run(self, stream: AbstractContextManager[object]) -> None:
        try:
            with stream:
                for _ in self._turns:
                    self._wait()
                    if self._stopped:
                        break
                    self._ready.put(self._draw())
        except BaseException as error:
            self._ready.put(_End(error))
        else:
            self._ready.put(_End())
        atexit.unregister(self._stop_at_exit)

    def _wait(self) -> None:
        """Wait until fewer batches are ready than are to be drawn ahead, or all are done."""
        while not self._stopped and self._ready.qsize() >= self._prefetch:
            self._wake_ups.get()
        with contextlib.suppress(queue.Empty):
            while True:  # those of batches that were taken while others were drawn
                self._wake_ups.get_nowait()

    def _stop_at_exit(self, thread: threading.Thread) -> None:
        # A daemon thread that is still at work in a library when Python ends may bring the process down.
        self.stop()
        if thread.ident is not None:
            thread.join(_LAST_WAIT)


def _is_on_gpu(buffer: Any) -> bool:
    backend = getattr(buffer, "backend", None)
    return backend is not None and backend.device.startswith("cuda")


def _drawn(draw: Callable[[], Any], handed: Callable[[Any], Any]) -> Any:
    return handed(draw())


def check_target(to: str | None, device: Any) -> None:
    """Refuse a library that samples cannot be handed over to, before any is drawn.

    Raises
    ------
    ValueError, ImportError
        As `to_library`; and for a device without a library.
    """
    if to is not None:
        to_library([], to, device=device)
    elif device is not None:
        raise ValueError(f"expected to= with device={device!r}: the library whose arrays to hand over there")


def hand_over(sample: Any, library: str, copy: bool | None = None, device: Any = None) -> Any:
    """The sample in the arrays of a library, but for its rows."""
    if not _is_sample(sample):
        return hand_over_batch(sample, library, copy=copy, device=device)
    # They are for the buffer alone, and of a dtype that not every library has (JAX has no int64).
    handed: Any = hand_over_batch(sample._replace(rows=None), library, copy=copy, device=device)
    return handed._replace(rows=sample.rows)


def _is_sample(sample: Any) -> bool:
    """Whether it is a named tuple that says which rows it is of, as that of a `ReplayBuffer` is."""
    return "rows" in getattr(sample, "_fields", ())


# The data sets of other libraries ----------------------------------------------------------------------------------


def torch_dataset(buffer: Any, batch_size: int, **options: Any) -> Any:
    """A `torch.utils.data.IterableDataset` of samples, for a `DataLoader` or a loop.

    Parameters
    ----------
    buffer : ReplayBuffer
        What to sample from.
    batch_size : int
        The size of each sample; the `DataLoader` puts none together itself: ``DataLoader(dataset, batch_size=None)``.
    **options
        As for `Batches`; `to` is "torch" if it is not given.

    Returns
    -------
    torch.utils.data.IterableDataset
        Each loop over it is a `Batches` of its own, and without `count` it has no end.

    Raises
    ------
    ImportError
        If torch is not installed.
    RuntimeError
        From a `DataLoader` with worker processes: each of them would sample from a copy of the buffer that no new item
        ever reaches. The thread of `Batches` does what they are for.
    """
    dataset: Any = _torch_dataset_class()
    return dataset(functools.partial(Batches, buffer, batch_size, **{"to": "torch", **options}))


@functools.lru_cache(maxsize=1)
def _torch_dataset_class() -> type:
    data = _import("torch.utils.data", "torch")

    class SampleDataset(data.IterableDataset):  # type: ignore[misc, name-defined]  # a class that is found at run time
        """Samples of a buffer; see `torch_dataset`."""

        def __init__(self, batches: Callable[[], Batches]) -> None:
            self._batches = batches

        def __iter__(self) -> Batches:
            if data.get_worker_info() is not None:
                raise RuntimeError(_NO_WORKERS)
            return self._batches()

        def __getstate__(self) -> Any:
            raise RuntimeError(_NO_WORKERS)

    return SampleDataset


_NO_WORKERS = (
    "a worker process would sample from a copy of the buffer, which no new item reaches; use num_workers=0: a thread "
    "draws the batches ahead as it is"
)


def tf_dataset(buffer: Any, batch_size: int, **options: Any) -> Any:
    """A `tf.data.Dataset` of samples.

    Parameters
    ----------
    buffer : ReplayBuffer
        What to sample from.
    batch_size : int
        The size of each sample.
    **options
        As for `Batches`, without `to`, `copy` and `device`: batches go through main memory, and TensorFlow copies them.

    Returns
    -------
    tf.data.Dataset
        Each element is a dict of the fields of the sample that are not None, in nests as tf.data has them: lists are
        tuples, and dataclasses are dicts. Each loop over it is a `Batches` of its own, and without `count` it has no
        end.

    Raises
    ------
    ImportError
        If TensorFlow is not installed.
    TypeError
        If an option is `to`, `copy` or `device`.
    ValueError
        If there is nothing to sample, or nothing in a pass.

    Notes
    -----
    One sample is drawn at once, from which the shapes and dtypes are read.
    """
    for name in ("to", "copy", "device"):
        if name in options:
            raise TypeError(f"a tf.data.Dataset copies into tensors of its own; {name}= has no place here")
    tf = _import("tensorflow", "tensorflow")
    with Batches(buffer, batch_size, **{**options, "prefetch": 0, "count": 1}) as first:
        samples = list(first)
    if not samples:
        raise ValueError("expected at least one batch, from which the shapes and dtypes are read, found none")
    structure = _as_tf_nest(_given(samples[0]))

    def spec(array: Any) -> Any:
        shape = array.shape if options.get("passes") is None else (None, *array.shape[1:])  # the last may be smaller
        return tf.TensorSpec(shape, array.dtype)

    return tf.data.Dataset.from_generator(
        lambda: (_as_tf_nest(_given(sample)) for sample in Batches(buffer, batch_size, **options)),
        output_signature=tf.nest.map_structure(spec, structure),
    )


def _given(sample: Any) -> Any:
    """The fields of a sample that are not None, by name."""
    if not _is_sample(sample):
        return sample
    return {name: value for name, value in sample._asdict().items() if value is not None}


def _as_tf_nest(node: Any) -> Any:
    """A nest as tf.data has them, with NumPy arrays at the leaves."""
    if is_array(node):
        return to_numpy(node)
    parts = {key: _as_tf_nest(child) for key, child in children(node).items()}
    if hasattr(node, "_fields"):
        return type(node)(**parts)
    return tuple(parts.values()) if isinstance(node, (list, tuple)) else parts


def _import(module: str, library: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"this data set needs {library}, which cannot be imported ({error}); pip install 'anystore[{library}]'"
        ) from error
