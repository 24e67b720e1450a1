"""Measured side by side: stores, replay buffers and snapshots, of anystore and of others."""

import os

# So that the work of a call of JAX is part of its time, and not of that of whoever has the next turn.
os.environ.setdefault("JAX_CPU_ENABLE_ASYNC_DISPATCH", "0")
