/* The rows of every leaf, moved in one call: the functions of moves.py, compiled.
 *
 * Nothing here decides what an index or a value means. Rows arrive checked (rows.py). A value is written only if
 * each of its leaves can be taken byte for byte; of any other, scatter writes nothing and says so, and values.py
 * converts it or refuses it.
 */
#define _GNU_SOURCE /* for sched_getaffinity */
#define PY_SSIZE_T_CLEAN
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#define NPY_TARGET_VERSION NPY_1_22_API_VERSION
#include <Python.h>
#include <numpy/arrayobject.h>

#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#ifdef __SSE2__
#include <emmintrin.h>
#endif

#define MOST_THREADS 4
/* Below this many bytes for each, another thread costs more than it brings. */
#define BYTES_PER_THREAD (3 << 17)
/* What a thread takes at a time: enough to be worth the taking, few enough that none is left waiting for long. */
#define BYTES_PER_CHUNK (1 << 18)
/* Below this many bytes in all, other Python threads may as well wait. */
#define BYTES_WITHOUT_GIL (1 << 15)

static int threads_at_hand = 1;
static PyObject *name_start, *name_step;


/* Blocks of memory for batches ------------------------------------------------------------------------------------
 *
 * The first write to a fresh page costs more than the copy itself, so the memory of a batch that died serves the
 * next one. Blocks are kept and given out under the GIL. */

#define SMALLEST_BLOCK (1 << 20)
#define MOST_IDLE_BYTES (64 << 20)
#define MOST_IDLE_BLOCKS 64
/* A block that was last given out so many bytes ago is in no cache any more. */
#define BYTES_IN_CACHES (32 << 20)
/* A write of so many bytes, to a buffer that no cache can hold, goes past the caches as well. */
#define COLD_WRITE (1 << 17)

typedef struct {
    void *memory;
    size_t size;
    uint64_t given; /* the bytes that were given out in all, itself included */
} Block;

static Block idle[MOST_IDLE_BLOCKS]; /* the one that has been idle for the longest time first */
static int idle_count = 0;
static size_t idle_bytes = 0;
static uint64_t given_bytes = 0;

static Block drop_idle(int position)
{
    Block block = idle[position];
    idle_count--;
    idle_bytes -= block.size;
    memmove(idle + position, idle + position + 1, (idle_count - position) * sizeof(Block));
    return block;
}

static void give_block(Block block)
{
    while (idle_count > 0 && (idle_count == MOST_IDLE_BLOCKS || idle_bytes + block.size > MOST_IDLE_BYTES)) {
        Block oldest = drop_idle(0);
        munmap(oldest.memory, oldest.size);
    }
    if (block.size > MOST_IDLE_BYTES) {
        munmap(block.memory, block.size);
        return;
    }
    idle[idle_count++] = block;
    idle_bytes += block.size;
}

/* A block of at least this size, and whether it is in no cache; its memory is NULL if there is none. */
static Block take_block(size_t size, int *is_cold)
{
    *is_cold = 0;
    given_bytes += size;
    for (int i = idle_count - 1; i >= 0; i--) {
        if (idle[i].size >= size && idle[i].size - size <= size / 4) {
            Block block = drop_idle(i);
            *is_cold = given_bytes - block.given > BYTES_IN_CACHES;
            block.given = given_bytes;
            return block;
        }
    }
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    Block block = {NULL, (size + page - 1) / page * page, given_bytes};
    void *memory = mmap(NULL, block.size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED)
        return block;
#ifdef MADV_HUGEPAGE
    madvise(memory, block.size, MADV_HUGEPAGE);
#endif
    block.memory = memory;
    return block;
}

static void release_block(PyObject *capsule)
{
    Block *block = PyCapsule_GetPointer(capsule, NULL);
    give_block(*block);
    PyMem_Free(block);
}

/* An array whose memory goes back to the idle blocks when the last reference to it is gone. */
static PyObject *new_in_block(PyArray_Descr *descr, int ndim, npy_intp *dims, size_t size, int *is_cold)
{
    Block *block = PyMem_Malloc(sizeof(Block));
    if (block == NULL)
        return PyErr_NoMemory();
    *block = take_block(size, is_cold);
    if (block->memory == NULL) {
        PyMem_Free(block);
        return PyErr_NoMemory();
    }
    PyObject *owner = PyCapsule_New(block, NULL, release_block);
    if (owner == NULL) {
        give_block(*block);
        PyMem_Free(block);
        return NULL;
    }
    Py_INCREF(descr);
    PyObject *array =
        PyArray_NewFromDescr(&PyArray_Type, descr, ndim, dims, NULL, block->memory, NPY_ARRAY_CARRAY, NULL);
    if (array == NULL) {
        Py_DECREF(owner);
        return NULL;
    }
    if (PyArray_SetBaseObject((PyArrayObject *)array, owner) < 0) { /* which has taken the owner, even so */
        Py_DECREF(array);
        return NULL;
    }
    return array;
}

static PyObject *new_array(PyArray_Descr *descr, int ndim, npy_intp *dims, size_t size, int *is_cold)
{
    if (size >= SMALLEST_BLOCK)
        return new_in_block(descr, ndim, dims, size, is_cold);
    Py_INCREF(descr);
    return PyArray_NewFromDescr(&PyArray_Type, descr, ndim, dims, NULL, NULL, 0, NULL);
}


/* Rows ------------------------------------------------------------------------------------------------------------ */

typedef struct {
    int ndim; /* the axes that a batch of these rows has in front */
    npy_intp dims[NPY_MAXDIMS];
    npy_intp count;
    npy_intp start, step; /* row i is start + i * step, */
    npy_intp *index;      /* or index[i] if there is one: a copy, since who made it may change it, or it is a leaf itself */
} Rows;

static void free_rows(Rows *rows)
{
    PyMem_Free(rows->index);
}

/* The rows of an int, a range or a C-contiguous array of intp; -1 with an exception for anything else. */
static int read_rows(PyObject *object, Rows *rows)
{
    rows->ndim = 0;
    rows->count = 1;
    rows->start = rows->step = 0;
    rows->index = NULL;
    if (PyLong_Check(object)) {
        rows->start = PyLong_AsSsize_t(object);
        return rows->start == -1 && PyErr_Occurred() ? -1 : 0;
    }
    if (PyRange_Check(object)) {
        PyObject *start = PyObject_GetAttr(object, name_start), *step = PyObject_GetAttr(object, name_step);
        if (start != NULL && step != NULL) {
            rows->start = PyLong_AsSsize_t(start);
            rows->step = PyLong_AsSsize_t(step);
            rows->count = PyObject_Size(object);
        }
        Py_XDECREF(start);
        Py_XDECREF(step);
        rows->ndim = 1;
        rows->dims[0] = rows->count;
        npy_intp last;
        if (!PyErr_Occurred() && rows->count > 1 &&
            (__builtin_mul_overflow(rows->count - 1, rows->step, &last) ||
             __builtin_add_overflow(last, rows->start, &last)))
            PyErr_SetString(PyExc_IndexError, "a row is out of range");
        return PyErr_Occurred() ? -1 : 0;
    }
    if (!PyArray_CheckExact(object) || PyArray_TYPE((PyArrayObject *)object) != NPY_INTP ||
        !PyArray_ISCARRAY_RO((PyArrayObject *)object)) {
        PyErr_SetString(PyExc_TypeError, "expected rows: an int, a range or a C-contiguous array of intp");
        return -1;
    }
    PyArrayObject *array = (PyArrayObject *)object;
    rows->ndim = PyArray_NDIM(array);
    rows->count = PyArray_SIZE(array);
    if (rows->ndim > 0)
        memcpy(rows->dims, PyArray_DIMS(array), rows->ndim * sizeof(npy_intp));
    rows->index = PyMem_Malloc((rows->count > 0 ? rows->count : 1) * sizeof(npy_intp));
    if (rows->index == NULL) {
        PyErr_NoMemory();
        return -1;
    }
    memcpy(rows->index, PyArray_DATA(array), rows->count * sizeof(npy_intp));
    return 0;
}

/* Whether each row is at least 0 and below the capacity. By signs, since SSE2 cannot compare 64 bits. */
static int all_below(const npy_intp *rows, npy_intp count, npy_intp capacity)
{
    npy_uintp signs = 0, last = (npy_uintp)capacity - 1;
    for (npy_intp i = 0; i < count; i++)
        signs |= (npy_uintp)rows[i] | (last - (npy_uintp)rows[i]);
    return (npy_intp)signs >= 0;
}

static inline npy_intp row_at(const Rows *rows, npy_intp i)
{
    return rows->index != NULL ? rows->index[i] : rows->start + i * rows->step;
}


/* Moving ---------------------------------------------------------------------------------------------------------- */

typedef struct {
    char *buffer;        /* row 0 of the buffer */
    char *batch;         /* row 0 of what is read or written */
    npy_intp width;      /* the bytes of a row */
    npy_intp batch_step; /* the bytes from one row of the batch to the next: the width, or 0 for one item to all */
    PyObject *held;      /* what owns the memory of the batch, if nobody else does */
    int is_cold;         /* whether the memory that is written to is in no cache */
    _Alignas(16) char number[32]; /* the memory of a batch that is a single number, as NumPy expects it */
} Move;

typedef struct {
    Move *moves;
    Py_ssize_t count;
    const Rows *rows;
    npy_intp chunk; /* the rows that a thread takes at a time */
    int reading;
    npy_intp next; /* the first row that no thread has taken yet */
    int helping;   /* the helpers that are at it */
} Task;

/* Rows of so many bytes are worth a way of their own. */
#define WIDE_ROW 1024

/* Rows are fetched from memory this far ahead of their turn. */
#define AHEAD 16

/* With the width known, the compiler makes loads and stores of each memcpy. */
#define MOVE_EACH(WIDTH)                                                                                 \
    for (npy_intp i = from; i < to; i++) {                                                               \
        char *row = buffer + (index != NULL ? index[i] : start + i * step) * (npy_intp)(WIDTH);          \
        char *other = batch + i * (reading ? (npy_intp)(WIDTH) : batch_step);                            \
        if (index != NULL && i + AHEAD < to) {                                                           \
            const char *ahead = buffer + index[i + AHEAD] * (npy_intp)(WIDTH);                           \
            reading ? __builtin_prefetch(ahead, 0) : __builtin_prefetch(ahead, 1);                       \
        }                                                                                                \
        memcpy(reading ? other : row, reading ? row : other, (size_t)(WIDTH));                           \
    }

/* Past the caches: a write through them would first fetch the memory that it overwrites. Of any size: the last chunk of
 * a task may be a byte. */
static void copy_past_caches(char *to, const char *from, size_t size)
{
#ifdef __SSE2__
    size_t to_line = -(uintptr_t)to % 16, i = to_line < size ? to_line : size;
    memcpy(to, from, i);
    for (; i + 64 <= size; i += 64) {
        const __m128i *source = (const __m128i *)(from + i);
        __m128i *target = (__m128i *)(to + i);
        __m128i a = _mm_loadu_si128(source), b = _mm_loadu_si128(source + 1);
        __m128i c = _mm_loadu_si128(source + 2), d = _mm_loadu_si128(source + 3);
        _mm_stream_si128(target, a);
        _mm_stream_si128(target + 1, b);
        _mm_stream_si128(target + 2, c);
        _mm_stream_si128(target + 3, d);
    }
    memcpy(to + i, from + i, size - i);
    _mm_sfence();
#else
    memcpy(to, from, size);
#endif
}

static inline void move_each(const Move *move, const Rows *rows, npy_intp from, npy_intp to, const int reading)
{
    /* In variables, since for all that the compiler knows each write may change what the pointers lead to. */
    char *const buffer = move->buffer, *const batch = move->batch;
    const npy_intp *const index = rows->index, start = rows->start, step = rows->step;
    const npy_intp width = move->width, batch_step = move->batch_step;
    switch (width) {
    case 1: MOVE_EACH(1) break;
    case 2: MOVE_EACH(2) break;
    case 4: MOVE_EACH(4) break;
    case 8: MOVE_EACH(8) break;
    case 12: MOVE_EACH(12) break;
    case 16: MOVE_EACH(16) break;
    case 32: MOVE_EACH(32) break;
    default: MOVE_EACH(width)
    }
}

/* So many rows from `row` of the buffer on, and from `place` of the batch on. */
static inline void move_run(const Task *task, const Move *move, npy_intp row, npy_intp place, npy_intp count)
{
    char *buffer = move->buffer + row * move->width, *batch = move->batch + place * move->batch_step;
    char *to = task->reading ? batch : buffer;
    const char *from = task->reading ? buffer : batch;
    if (move->is_cold)
        copy_past_caches(to, from, (size_t)(count * move->width));
    else
        memcpy(to, from, (size_t)(count * move->width));
}

static void move_some(const Task *task, npy_intp from, npy_intp to)
{
    const Rows *rows = task->rows;
    npy_intp count = to - from;
    for (Py_ssize_t i = 0; i < task->count; i++) {
        const Move *move = task->moves + i;
        if (move->width == 0 || count == 0)
            continue;
        if (rows->index == NULL && (rows->step == 1 || count == 1) && move->batch_step == move->width) {
            move_run(task, move, row_at(rows, from), from, count);
        } else if (move->is_cold && move->width >= WIDE_ROW) {
            for (npy_intp j = from; j < to; j++)
                move_run(task, move, row_at(rows, j), j, 1);
        } else if (task->reading) {
            move_each(move, rows, from, to, 1);
        } else {
            move_each(move, rows, from, to, 0);
        }
    }
}

/* Chunk after chunk, until none is left that another thread has not taken. */
static void work_on(Task *task)
{
    npy_intp count = task->rows->count, from;
    while ((from = __atomic_fetch_add(&task->next, task->chunk, __ATOMIC_RELAXED)) < count)
        move_some(task, from, from + task->chunk < count ? from + task->chunk : count);
}


/* Helpers ---------------------------------------------------------------------------------------------------------
 *
 * Threads that wait for a task to help with. The caller takes chunks as well and waits only for those that a helper is
 * at, so that on a busy machine it is no later than it would be alone. One task is helped with at a time. */

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t task_came = PTHREAD_COND_INITIALIZER, helpers_left = PTHREAD_COND_INITIALIZER;
static Task *open_task = NULL;
static unsigned long task_number = 0; /* so that a helper takes part in each task once */
static int helpers = 0;

static void *help(void *unused)
{
    unsigned long seen = 0;
    pthread_mutex_lock(&lock);
    for (;;) {
        while (open_task == NULL || task_number == seen)
            pthread_cond_wait(&task_came, &lock);
        Task *task = open_task;
        seen = task_number;
        task->helping++;
        pthread_mutex_unlock(&lock);
        work_on(task);
        pthread_mutex_lock(&lock);
        if (--task->helping == 0)
            pthread_cond_broadcast(&helpers_left); /* more than one caller may be waiting for its own */
    }
    return unused;
}

static void start_helpers(int count)
{
    while (helpers < count) {
        pthread_t thread;
        if (pthread_create(&thread, NULL, help, NULL) != 0)
            return;
        pthread_detach(thread);
        helpers++;
    }
}

/* In the child of a fork there are no helpers, and nobody is left to finish what they were at. */
static void forget_helpers(void)
{
    pthread_mutex_init(&lock, NULL);
    pthread_cond_init(&task_came, NULL);
    pthread_cond_init(&helpers_left, NULL);
    open_task = NULL;
    helpers = 0;
}

static void work_with_helpers(Task *task, int threads)
{
    pthread_mutex_lock(&lock);
    int is_mine = open_task == NULL;
    if (is_mine) {
        start_helpers(threads - 1);
        open_task = task;
        task_number++;
        pthread_cond_broadcast(&task_came);
    }
    pthread_mutex_unlock(&lock);
    work_on(task);
    if (!is_mine)
        return;
    pthread_mutex_lock(&lock);
    open_task = NULL;
    while (task->helping > 0)
        pthread_cond_wait(&helpers_left, &lock);
    pthread_mutex_unlock(&lock);
}

static void run_all(Move *moves, Py_ssize_t count, const Rows *rows, int reading)
{
    npy_intp bytes = 0;
    for (Py_ssize_t i = 0; i < count; i++)
        bytes += moves[i].width * rows->count;
    Task task = {moves, count, rows, rows->count, reading, 0, 0};
    if (rows->count == 0)
        return;
    if (bytes < BYTES_WITHOUT_GIL) {
        move_some(&task, 0, rows->count);
        return;
    }
    int threads = 1;
    /* Several values for one row must be written in their order. */
    if (reading || rows->index == NULL) {
        npy_intp wanted = bytes / BYTES_PER_THREAD;
        threads = wanted < threads_at_hand ? (int)wanted : threads_at_hand;
    }
    PyThreadState *state = PyEval_SaveThread();
    if (threads > 1) {
        npy_intp chunk = BYTES_PER_CHUNK * rows->count / bytes;
        task.chunk = chunk > 1 ? chunk : 1;
        work_with_helpers(&task, threads);
    } else {
        move_some(&task, 0, rows->count);
    }
    PyEval_RestoreThread(state);
}

static Move *new_moves(Py_ssize_t count)
{
    Move *moves = PyMem_Calloc(count > 0 ? count : 1, sizeof(Move));
    if (moves == NULL)
        PyErr_NoMemory();
    return moves;
}

static void free_moves(Move *moves, Py_ssize_t count)
{
    for (Py_ssize_t i = 0; i < count; i++)
        Py_XDECREF(moves[i].held);
    PyMem_Free(moves);
}

/* The bytes of a row of a buffer. */
static npy_intp width_of(PyArrayObject *buffer)
{
    npy_intp width = PyArray_ITEMSIZE(buffer);
    for (int i = 1; i < PyArray_NDIM(buffer); i++)
        width *= PyArray_DIM(buffer, i);
    return width;
}

/* Whether every row is one of the buffer's: that they were checked before does not keep another thread from having
 * changed them since. */
static int are_inside(const Rows *rows, PyArrayObject *buffer)
{
    npy_uintp capacity = PyArray_DIM(buffer, 0);
    if (rows->index != NULL)
        return all_below(rows->index, rows->count, PyArray_DIM(buffer, 0));
    return rows->count == 0 ||
           ((npy_uintp)row_at(rows, 0) < capacity && (npy_uintp)row_at(rows, rows->count - 1) < capacity);
}

/* The buffers of a call, a list of C-contiguous arrays; their moves, or NULL with an exception. */
static Move *moves_of(PyObject *buffers, const Rows *rows)
{
    if (!PyList_Check(buffers)) {
        PyErr_SetString(PyExc_TypeError, "expected a list of buffers");
        return NULL;
    }
    Py_ssize_t count = PyList_GET_SIZE(buffers);
    Move *moves = new_moves(count);
    for (Py_ssize_t i = 0; moves != NULL && i < count; i++) {
        PyArrayObject *buffer = (PyArrayObject *)PyList_GET_ITEM(buffers, i);
        if (!PyArray_CheckExact(buffer) || !PyArray_IS_C_CONTIGUOUS(buffer) || PyArray_NDIM(buffer) < 1) {
            PyErr_SetString(PyExc_TypeError, "expected C-contiguous arrays as buffers");
            free_moves(moves, count);
            return NULL;
        }
        if ((i == 0 || PyArray_DIM(buffer, 0) != PyArray_DIM((PyArrayObject *)PyList_GET_ITEM(buffers, 0), 0)) &&
            !are_inside(rows, buffer)) {
            PyErr_SetString(PyExc_IndexError, "a row is out of range; it was changed after it was checked");
            free_moves(moves, count);
            return NULL;
        }
        moves[i].buffer = PyArray_BYTES(buffer);
        moves[i].width = moves[i].batch_step = width_of(buffer);
    }
    return moves;
}


/* The rows and the moves of a call, to be given to end; NULL with an exception, and then nothing is owed. */
static Move *begin(PyObject *buffers, PyObject *object, Rows *rows)
{
    if (read_rows(object, rows) < 0)
        return NULL;
    Move *moves = moves_of(buffers, rows);
    if (moves == NULL)
        free_rows(rows);
    return moves;
}

static void end(Move *moves, Py_ssize_t count, Rows *rows)
{
    free_moves(moves, count);
    free_rows(rows);
}


/* gather ---------------------------------------------------------------------------------------------------------- */

static const char gather_doc[] =
    "gather(buffers, rows) -> list of arrays\n\nThe rows of every buffer, in memory of their own.";

static PyObject *gather(PyObject *module, PyObject *const *arguments, Py_ssize_t argument_count)
{
    Rows rows;
    if (argument_count != 2) {
        PyErr_SetString(PyExc_TypeError, "expected buffers and rows");
        return NULL;
    }
    PyObject *buffers = arguments[0];
    Move *moves = begin(buffers, arguments[1], &rows);
    if (moves == NULL)
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(buffers);
    PyObject *leaves = PyList_New(count);
    for (Py_ssize_t i = 0; leaves != NULL && i < count; i++) {
        PyArrayObject *buffer = (PyArrayObject *)PyList_GET_ITEM(buffers, i);
        int ndim = rows.ndim + PyArray_NDIM(buffer) - 1;
        PyObject *leaf = NULL;
        if (ndim > NPY_MAXDIMS) {
            PyErr_SetString(PyExc_ValueError, "the index and the leaf have too many axes for NumPy");
        } else {
            npy_intp dims[NPY_MAXDIMS];
            memcpy(dims, rows.dims, rows.ndim * sizeof(npy_intp));
            memcpy(dims + rows.ndim, PyArray_DIMS(buffer) + 1, (ndim - rows.ndim) * sizeof(npy_intp));
            leaf = new_array(PyArray_DESCR(buffer), ndim, dims, (size_t)(rows.count * moves[i].width),
                             &moves[i].is_cold);
        }
        if (leaf == NULL) {
            Py_CLEAR(leaves);
            break;
        }
        moves[i].batch = PyArray_BYTES((PyArrayObject *)leaf);
        PyList_SET_ITEM(leaves, i, leaf);
    }
    if (leaves != NULL)
        run_all(moves, count, &rows, 1);
    end(moves, count, &rows);
    return leaves;
}


/* view_one -------------------------------------------------------------------------------------------------------- */

static const char view_one_doc[] = "view_one(buffers, row) -> list of arrays\n\nLive views of one row of every buffer.";

static PyObject *view_one(PyObject *module, PyObject *const *arguments, Py_ssize_t argument_count)
{
    if (argument_count != 2) {
        PyErr_SetString(PyExc_TypeError, "expected buffers and a row");
        return NULL;
    }
    Rows rows;
    if (read_rows(arguments[1], &rows) < 0)
        return NULL;
    npy_intp row = rows.start;
    Move *moves = rows.ndim == 0 ? moves_of(arguments[0], &rows) : NULL;
    free_rows(&rows);
    if (moves == NULL) {
        if (!PyErr_Occurred())
            PyErr_SetString(PyExc_TypeError, "expected a single row");
        return NULL;
    }
    Py_ssize_t count = PyList_GET_SIZE(arguments[0]);
    PyObject *leaves = PyList_New(count);
    for (Py_ssize_t i = 0; leaves != NULL && i < count; i++) {
        PyArrayObject *buffer = (PyArrayObject *)PyList_GET_ITEM(arguments[0], i);
        int flags = NPY_ARRAY_C_CONTIGUOUS | (PyArray_FLAGS(buffer) & (NPY_ARRAY_WRITEABLE | NPY_ARRAY_ALIGNED));
        Py_INCREF(PyArray_DESCR(buffer));
        PyObject *leaf = PyArray_NewFromDescr(&PyArray_Type, PyArray_DESCR(buffer), PyArray_NDIM(buffer) - 1,
                                              PyArray_DIMS(buffer) + 1, NULL, moves[i].buffer + row * moves[i].width,
                                              flags, NULL);
        if (leaf != NULL) {
            Py_INCREF(buffer);
            if (PyArray_SetBaseObject((PyArrayObject *)leaf, (PyObject *)buffer) < 0)
                Py_CLEAR(leaf);
        }
        if (leaf == NULL) {
            Py_CLEAR(leaves);
            break;
        }
        PyList_SET_ITEM(leaves, i, leaf);
    }
    free_moves(moves, count);
    return leaves;
}


/* gather_into and scatter ------------------------------------------------------------------------------------------ */

static int same_dims(const npy_intp *one, const npy_intp *other, int count)
{
    return count == 0 || memcmp(one, other, count * sizeof(npy_intp)) == 0; /* of no axes there is no address either */
}

/* Whether the array has these axes in front and then those of a row of the buffer. */
static int has_shape(PyArrayObject *array, PyArrayObject *buffer, int ndim, const npy_intp *dims)
{
    int row_ndim = PyArray_NDIM(buffer) - 1;
    return PyArray_NDIM(array) == ndim + row_ndim && same_dims(PyArray_DIMS(array), dims, ndim) &&
           same_dims(PyArray_DIMS(array) + ndim, PyArray_DIMS(buffer) + 1, row_ndim);
}

static int same_dtype(PyArray_Descr *one, PyArray_Descr *other)
{
    return one == other || PyArray_EquivTypes(one, other);
}

/* Whether the batch shares memory with a buffer, which would change under its reader. */
static int overlaps(PyArrayObject *array, PyObject *buffers)
{
    const char *start = PyArray_BYTES(array), *end = start + PyArray_NBYTES(array);
    for (Py_ssize_t i = 0; i < PyList_GET_SIZE(buffers); i++) {
        PyArrayObject *buffer = (PyArrayObject *)PyList_GET_ITEM(buffers, i);
        if (start < PyArray_BYTES(buffer) + PyArray_NBYTES(buffer) && PyArray_BYTES(buffer) < end)
            return 1;
    }
    return 0;
}

/* 1 if the array can be read as the batch of this move, 0 if not, -1 with an exception. */
static int read_array(PyArrayObject *array, PyObject *buffers, Py_ssize_t i, const Rows *rows, Move *move)
{
    PyArrayObject *buffer = (PyArrayObject *)PyList_GET_ITEM(buffers, i);
    if (!same_dtype(PyArray_DESCR(array), PyArray_DESCR(buffer)))
        return 0;
    if (!has_shape(array, buffer, rows->ndim, rows->dims)) {
        if (!has_shape(array, buffer, 0, NULL))
            return 0;
        move->batch_step = 0;
    }
    if (!PyArray_IS_C_CONTIGUOUS(array) || overlaps(array, buffers)) {
        move->held = PyArray_NewCopy(array, NPY_CORDER);
        if (move->held == NULL)
            return -1;
        array = (PyArrayObject *)move->held;
    }
    move->batch = PyArray_BYTES(array);
    move->is_cold = PyArray_NBYTES(buffer) > BYTES_IN_CACHES && move->width * rows->count >= COLD_WRITE;
    return 1;
}

/* Whether the integer is one of the buffer's dtype; NumPy before 2.0 would wrap it. */
static int fits_integer(PyObject *number, PyArrayObject *buffer)
{
    int overflow, bits = 8 * (int)PyArray_ITEMSIZE(buffer);
    long long value = PyLong_AsLongLongAndOverflow(number, &overflow);
    if (PyTypeNum_ISUNSIGNED(PyArray_TYPE(buffer))) {
        if (overflow > 0 && bits == 64) {
            PyLong_AsUnsignedLongLong(number);
            int fits = !PyErr_Occurred();
            PyErr_Clear();
            return fits;
        }
        return overflow == 0 && value >= 0 && (bits == 64 || value < 1LL << bits);
    }
    return overflow == 0 && (bits == 64 || (value >= -(1LL << (bits - 1)) && value < 1LL << (bits - 1)));
}

/* 1 if the number, Python's or NumPy's, can be read as the batch of this move, 0 if not, -1 with an exception. */
static int read_number(PyObject *number, PyArrayObject *buffer, Move *move)
{
    PyArray_Descr *descr = PyArray_DESCR(buffer);
    if (PyArray_NDIM(buffer) != 1 || move->width > (npy_intp)sizeof(move->number))
        return 0;
    if (Py_TYPE(number) == descr->typeobj) {
        /* Only of these is the class all there is to know. */
        if (!PyTypeNum_ISNUMBER(descr->type_num) && !PyTypeNum_ISBOOL(descr->type_num))
            return 0;
        if (!PyArray_ISNBO(descr->byteorder))
            return 0;
        PyArray_ScalarAsCtype(number, move->number);
    } else if ((PyFloat_CheckExact(number) && PyTypeNum_ISFLOAT(descr->type_num)) ||
               (PyLong_CheckExact(number) && PyTypeNum_ISINTEGER(descr->type_num) && fits_integer(number, buffer)) ||
               (PyBool_Check(number) && PyTypeNum_ISBOOL(descr->type_num))) {
        if (PyArray_SETITEM(buffer, move->number, number) < 0) {
            PyErr_Clear(); /* values.py says it, by the path of the leaf */
            return 0;
        }
    } else {
        return 0;
    }
    move->batch = move->number;
    move->batch_step = 0;
    return 1;
}

static const char scatter_doc[] =
    "scatter(buffers, rows, leaves) -> bool\n\n"
    "Write a leaf to the rows of each buffer, if every one can be taken just as it is; else write nothing: False.";

static PyObject *scatter(PyObject *module, PyObject *const *arguments, Py_ssize_t argument_count)
{
    Rows rows;
    if (argument_count != 3 || !PyList_Check(arguments[2])) {
        PyErr_SetString(PyExc_TypeError, "expected buffers, rows and a list of leaves");
        return NULL;
    }
    PyObject *buffers = arguments[0], *leaves = arguments[2];
    Move *moves = begin(buffers, arguments[1], &rows);
    if (moves == NULL)
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(buffers);
    int good = PyList_GET_SIZE(leaves) == count;
    for (Py_ssize_t i = 0; good == 1 && i < count; i++) {
        PyObject *leaf = PyList_GET_ITEM(leaves, i);
        PyArrayObject *buffer = (PyArrayObject *)PyList_GET_ITEM(buffers, i);
        if (!PyArray_ISWRITEABLE(buffer))
            good = 0;
        else if (PyArray_CheckExact(leaf))
            good = read_array((PyArrayObject *)leaf, buffers, i, &rows, &moves[i]);
        else
            good = read_number(leaf, buffer, &moves[i]);
    }
    if (good == 1)
        run_all(moves, count, &rows, 0);
    end(moves, count, &rows);
    return good < 0 ? NULL : PyBool_FromLong(good);
}

static const char gather_into_doc[] =
    "gather_into(buffers, rows, out)\n\n"
    "Fill each array, of the shape and dtype that gather would return, with the rows of its buffer.";

static PyObject *gather_into(PyObject *module, PyObject *const *arguments, Py_ssize_t argument_count)
{
    Rows rows;
    if (argument_count != 3 || !PyList_Check(arguments[2])) {
        PyErr_SetString(PyExc_TypeError, "expected buffers, rows and a list of arrays");
        return NULL;
    }
    PyObject *buffers = arguments[0], *out = arguments[2];
    Move *moves = begin(buffers, arguments[1], &rows);
    if (moves == NULL)
        return NULL;
    Py_ssize_t count = PyList_GET_SIZE(buffers);
    int good = PyList_GET_SIZE(out) == count;
    for (Py_ssize_t i = 0; good && i < count; i++) {
        PyArrayObject *buffer = (PyArrayObject *)PyList_GET_ITEM(buffers, i);
        PyArrayObject *array = (PyArrayObject *)PyList_GET_ITEM(out, i);
        good = PyArray_CheckExact(array) && same_dtype(PyArray_DESCR(array), PyArray_DESCR(buffer)) &&
               has_shape(array, buffer, rows.ndim, rows.dims) && PyArray_ISWRITEABLE(array);
        if (!good)
            break;
        if (!PyArray_IS_C_CONTIGUOUS(array) || overlaps(array, buffers)) {
            /* Filled first, and then copied to where it belongs. */
            moves[i].held = PyArray_NewLikeArray(array, NPY_CORDER, NULL, 0);
            if (moves[i].held == NULL)
                break;
            array = (PyArrayObject *)moves[i].held;
        }
        moves[i].batch = PyArray_BYTES(array);
    }
    if (!good)
        PyErr_SetString(PyExc_TypeError, "expected writable arrays of the shape and dtype of the rows");
    if (!PyErr_Occurred())
        run_all(moves, count, &rows, 1);
    for (Py_ssize_t i = 0; !PyErr_Occurred() && i < count; i++) {
        if (moves[i].held != NULL)
            PyArray_CopyInto((PyArrayObject *)PyList_GET_ITEM(out, i), (PyArrayObject *)moves[i].held);
    }
    end(moves, count, &rows);
    if (PyErr_Occurred())
        return NULL;
    Py_RETURN_NONE;
}


/* all_inside ------------------------------------------------------------------------------------------------------- */

static const char all_inside_doc[] =
    "all_inside(index, capacity) -> bool\n\n"
    "Whether the index is a C-contiguous array of intp whose every element is at least 0 and below the capacity.";

static PyObject *all_inside(PyObject *module, PyObject *const *arguments, Py_ssize_t argument_count)
{
    if (argument_count != 2 || !PyArray_CheckExact(arguments[0])) {
        PyErr_SetString(PyExc_TypeError, "expected an array and a capacity");
        return NULL;
    }
    PyArrayObject *index = (PyArrayObject *)arguments[0];
    npy_intp capacity = PyLong_AsSsize_t(arguments[1]);
    if (capacity == -1 && PyErr_Occurred())
        return NULL;
    if (PyArray_TYPE(index) != NPY_INTP || !PyArray_ISCARRAY_RO(index) || PyArray_NDIM(index) == 0)
        Py_RETURN_FALSE;
    return PyBool_FromLong(all_below(PyArray_DATA(index), PyArray_SIZE(index), capacity));
}


/* last_writes ------------------------------------------------------------------------------------------------------ */

#define MOST_SLOTS_ON_STACK 1024

/* The slot of a row in a table of 2^bits: one that holds it, or the empty one where it belongs. A slot holds the
 * position of a row in `rows`, and one that is empty -1. */
static inline npy_intp *slot_of(npy_intp row, npy_intp *slots, int bits, const npy_intp *rows)
{
    /* Two multipliers of SplitMix64: with one alone, there are strides whose rows are all neighbours. */
    uint64_t mixed = (uint64_t)row * 0x9E3779B97F4A7C15u;
    uint64_t slot = (mixed ^ mixed >> 32) * 0xBF58476D1CE4E5B9u >> (64 - bits);
    while (slots[slot] >= 0 && rows[slots[slot]] != row)
        slot = (slot + 1) & (((uint64_t)1 << bits) - 1);
    return slots + slot;
}

static const char last_writes_doc[] =
    "last_writes(rows) -> array or None\n\n"
    "For each of the rows, a C-contiguous array of intp, the position of the last one that equals it, counted through\n"
    "all axes; None if no two are equal.";

static PyObject *last_writes(PyObject *module, PyObject *argument)
{
    PyArrayObject *array = (PyArrayObject *)argument;
    if (!PyArray_CheckExact(argument) || PyArray_TYPE(array) != NPY_INTP || !PyArray_ISCARRAY_RO(array)) {
        PyErr_SetString(PyExc_TypeError, "expected a C-contiguous array of intp");
        return NULL;
    }
    npy_intp count = PyArray_SIZE(array), repeated = 0;
    const npy_intp *rows = PyArray_DATA(array);
    int bits = 1;
    while (((npy_intp)1 << bits) < 2 * count)
        bits++;
    npy_intp on_stack[MOST_SLOTS_ON_STACK], *slots = on_stack;
    size_t size = sizeof(npy_intp) << bits;
    if (size > sizeof on_stack && (slots = PyMem_Malloc(size)) == NULL)
        return PyErr_NoMemory();
    memset(slots, -1, size);
    for (npy_intp i = 0; i < count; i++) {
        npy_intp *slot = slot_of(rows[i], slots, bits, rows);
        repeated += *slot >= 0;
        *slot = i;
    }
    PyObject *last = repeated ? PyArray_SimpleNew(1, &count, NPY_INTP) : Py_NewRef(Py_None);
    for (npy_intp i = 0; repeated && last != NULL && i < count; i++)
        ((npy_intp *)PyArray_DATA((PyArrayObject *)last))[i] = *slot_of(rows[i], slots, bits, rows);
    if (slots != on_stack)
        PyMem_Free(slots);
    return last;
}


static PyMethodDef functions[] = {
    {"all_inside", (PyCFunction)(void (*)(void))all_inside, METH_FASTCALL, all_inside_doc},
    {"gather", (PyCFunction)(void (*)(void))gather, METH_FASTCALL, gather_doc},
    {"gather_into", (PyCFunction)(void (*)(void))gather_into, METH_FASTCALL, gather_into_doc},
    {"last_writes", last_writes, METH_O, last_writes_doc},
    {"scatter", (PyCFunction)(void (*)(void))scatter, METH_FASTCALL, scatter_doc},
    {"view_one", (PyCFunction)(void (*)(void))view_one, METH_FASTCALL, view_one_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "anystore._moves",
    .m_doc = "The rows of every leaf, moved in one call.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__moves(void)
{
    import_array();
    pthread_atfork(NULL, NULL, forget_helpers);
    cpu_set_t allowed; /* which may be fewer than there are */
    long processors = sched_getaffinity(0, sizeof allowed, &allowed) == 0 ? CPU_COUNT(&allowed) : 1;
    threads_at_hand = processors < 1 ? 1 : processors > MOST_THREADS ? MOST_THREADS : (int)processors;
    name_start = PyUnicode_InternFromString("start");
    name_step = PyUnicode_InternFromString("step");
    if (name_start == NULL || name_step == NULL)
        return NULL;
    return PyModule_Create(&definition);
}
