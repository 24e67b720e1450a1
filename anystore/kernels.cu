/* The rows of every leaf, moved in one launch, and the rows that live on the GPU, checked there.

   The layout of Launch and Leaf is that of leaf_table.py, which fills them; a launch takes them by value, so that no
   table has to be sent ahead. The kernels move bytes and know no dtype. Every thread works on its own: nothing here
   waits for another thread, so that the tests can run this very file on a CPU, a thread at a time. */

typedef long long i64;
typedef unsigned long long u64;

#define THREADS 256   /* in a block, always */
#define LANES 4       /* that a thread moves, all loaded before the first is stored; not tuned on a GPU yet */
#define LAUNCH_BYTES 4096

struct Leaf {
    char *buffer;         /* of the storage */
    i64 batch;            /* what gather fills or scatter reads: how far it is behind the base of the launch */
    i64 width;            /* the bytes of a row */
    i64 step;             /* the bytes from row to row of the batch; 0 for a single row that goes to all */
    unsigned first_block; /* of the blocks that move this leaf */
    unsigned lane;        /* the bytes moved at a time, which divide the width, the step and both addresses */
};

struct Header {
    i64 count;        /* of the rows to move */
    char *base;       /* of the batch, where it lies in one block of memory; else null */
    const i64 *rows;  /* of the buffers, on the device; null where they are inside or evenly spaced */
    const i64 *order; /* for each of these, its row of the batch; null for one after the other */
    i64 start, step;  /* of evenly spaced rows */
    int leaves;       /* in the table */
    int inside;       /* 1: the rows stand behind the table; 2: the order behind the rows */
};

struct Launch {
    Header header;
    i64 payload[(LAUNCH_BYTES - sizeof(Header)) / sizeof(i64)];
};

static_assert(sizeof(Leaf) == 40 && sizeof(Header) == 56 && sizeof(Launch) == LAUNCH_BYTES,
              "the layout is that of leaf_table.py");

__device__ inline const Leaf *table_of(const Launch &launch)
{
    return (const Leaf *)launch.payload;
}

__device__ inline i64 buffer_row(const Launch &launch, i64 i)
{
    const Header &header = launch.header;
    if (header.inside & 1)
        return ((const i64 *)(table_of(launch) + header.leaves))[i];
    return header.rows != nullptr ? header.rows[i] : header.start + i * header.step;
}

__device__ inline i64 batch_row(const Launch &launch, i64 i)
{
    const Header &header = launch.header;
    if (header.inside & 2)
        return ((const i64 *)(table_of(launch) + header.leaves))[header.count + i];
    return header.order != nullptr ? header.order[i] : i;
}

/* The lanes of one block: LANES of a long row to each thread, or one of LANES short rows. */
template <typename Lane, bool GATHER>
__device__ inline void move(const Launch &launch, const Leaf &leaf, i64 block)
{
    const i64 lanes = leaf.width / (i64)sizeof(Lane), thread = threadIdx.x;
    i64 row, lane, next_row, next_lane;
    if (lanes >= THREADS) {
        const i64 blocks_per_row = (lanes + THREADS * LANES - 1) / (THREADS * LANES);
        row = block / blocks_per_row;
        lane = (block % blocks_per_row) * (THREADS * LANES) + thread;
        next_row = 0;
        next_lane = THREADS;
    } else {
        const int rows_at_once = THREADS / (int)lanes;
        const int beside = (int)thread / (int)lanes;
        if (beside >= rows_at_once)
            return;
        row = block * (rows_at_once * LANES) + beside;
        lane = thread - beside * lanes;
        next_row = rows_at_once;
        next_lane = 0;
    }
    Lane held[LANES];
    char *targets[LANES];
#pragma unroll
    for (int k = 0; k < LANES; k++) {
        const i64 i = row + k * next_row, offset = (lane + k * next_lane) * (i64)sizeof(Lane);
        targets[k] = nullptr;
        if (i >= launch.header.count || offset >= leaf.width)
            continue;
        char *in_buffer = leaf.buffer + buffer_row(launch, i) * leaf.width + offset;
        char *in_batch = launch.header.base + leaf.batch + (GATHER ? i : batch_row(launch, i)) * leaf.step + offset;
        held[k] = *(const Lane *)(GATHER ? in_buffer : in_batch);
        targets[k] = GATHER ? in_batch : in_buffer;
    }
#pragma unroll
    for (int k = 0; k < LANES; k++) {
        if (targets[k] != nullptr)
            *(Lane *)targets[k] = held[k];
    }
}

template <bool GATHER>
__device__ inline void run(const Launch &launch)
{
    const Leaf *table = table_of(launch);
    int leaf = 0, last = launch.header.leaves - 1;
    while (leaf < last) { /* the last one that starts at this block or before it */
        const int middle = (leaf + last + 1) / 2;
        if (table[middle].first_block <= blockIdx.x)
            leaf = middle;
        else
            last = middle - 1;
    }
    const i64 block = blockIdx.x - table[leaf].first_block;
    switch (table[leaf].lane) {
    case 16:
        return move<uint4, GATHER>(launch, table[leaf], block);
    case 8:
        return move<u64, GATHER>(launch, table[leaf], block);
    case 4:
        return move<unsigned, GATHER>(launch, table[leaf], block);
    case 2:
        return move<unsigned short, GATHER>(launch, table[leaf], block);
    default:
        return move<unsigned char, GATHER>(launch, table[leaf], block);
    }
}

extern "C" __global__ void __launch_bounds__(THREADS) gather(const __grid_constant__ Launch launch)
{
    run<true>(launch);
}

extern "C" __global__ void __launch_bounds__(THREADS) scatter(const __grid_constant__ Launch launch)
{
    run<false>(launch);
}


/* Rows that live on the GPU --------------------------------------------------------------------------------------- */

template <typename T, bool SIGNED>
__device__ inline void check_one(const void *index, i64 i, i64 capacity, i64 *rows, u64 *outside)
{
    const T found = ((const T *)index)[i];
    const bool negative = SIGNED && (i64)found < 0;
    const u64 size = negative ? 0 - (u64)(i64)found : (u64)found;
    if (negative ? size > (u64)capacity : size >= (u64)capacity)
        atomicMax(&outside[negative], size);
    rows[i] = (i64)(negative ? (u64)capacity - size : size);
}

/* The rows that an index of `count` integers of `bytes` each means, negative ones counted from the end.
   outside[0] becomes the largest row past the end, outside[1] the size of the most negative one before the start;
   both stay 0 where all rows are inside. */
extern "C" __global__ void __launch_bounds__(THREADS)
check(const void *index, i64 bytes, i64 is_signed, i64 count, i64 capacity, i64 *rows, u64 *outside)
{
    const i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count)
        return;
    if (is_signed) {
        switch (bytes) {
        case 1:
            return check_one<signed char, true>(index, i, capacity, rows, outside);
        case 2:
            return check_one<short, true>(index, i, capacity, rows, outside);
        case 4:
            return check_one<int, true>(index, i, capacity, rows, outside);
        default:
            return check_one<i64, true>(index, i, capacity, rows, outside);
        }
    }
    switch (bytes) {
    case 1:
        return check_one<unsigned char, false>(index, i, capacity, rows, outside);
    case 2:
        return check_one<unsigned short, false>(index, i, capacity, rows, outside);
    case 4:
        return check_one<unsigned, false>(index, i, capacity, rows, outside);
    default:
        return check_one<u64, false>(index, i, capacity, rows, outside);
    }
}

struct Slot {
    i64 row;  /* -1 in a free one */
    i64 last; /* of the positions at which the row was met */
};

__device__ inline u64 first_slot(i64 row, i64 bits)
{
    /* Two multipliers of SplitMix64, as in _moves.c: with one alone, there are strides whose rows are all neighbours. */
    const u64 mixed = (u64)row * 0x9E3779B97F4A7C15ull;
    return (mixed ^ mixed >> 32) * 0xBF58476D1CE4E5B9ull >> (64 - bits);
}

/* Note in a table of 2**bits slots, all bytes of which are 0xFF before, the last position of every row. */
extern "C" __global__ void __launch_bounds__(THREADS)
note_rows(const i64 *rows, i64 count, Slot *slots, i64 bits)
{
    const i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count)
        return;
    for (u64 slot = first_slot(rows[i], bits);; slot = (slot + 1) & ((1ull << bits) - 1)) {
        const i64 found = (i64)atomicCAS((u64 *)&slots[slot].row, ~0ull, (u64)rows[i]);
        if (found == -1 || found == rows[i]) {
            atomicMax(&slots[slot].last, i);
            return;
        }
    }
}

/* For each row the last of its positions: with the values in this order, all writes to a row write the same. */
extern "C" __global__ void __launch_bounds__(THREADS)
last_writes(const i64 *rows, i64 count, const Slot *slots, i64 bits, i64 *order)
{
    const i64 i = (i64)blockIdx.x * THREADS + threadIdx.x;
    if (i >= count)
        return;
    u64 slot = first_slot(rows[i], bits);
    while (slots[slot].row != rows[i])
        slot = (slot + 1) & ((1ull << bits) - 1);
    order[i] = slots[slot].last;
}
