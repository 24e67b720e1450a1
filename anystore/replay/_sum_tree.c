/* What sum_tree.py does for rows in main memory, compiled.
 *
 * The levels are flat arrays of doubles, from the values of the rows up to a top level of WIDTH sums at most.
 */
#define PY_SSIZE_T_CLEAN
#define NPY_NO_DEPRECATED_API NPY_1_22_API_VERSION
#define NPY_TARGET_VERSION NPY_1_22_API_VERSION
#include <Python.h>
#include <numpy/arrayobject.h>

#define WIDTH_BITS 4
#define WIDTH (1 << WIDTH_BITS)
#define MOST_LEVELS 16
/* How many rows are looked for side by side, so that the memory of one is on its way while another is worked on. */
#define ABREAST 32

typedef struct {
    double *values[MOST_LEVELS];
    npy_intp lengths[MOST_LEVELS];
    Py_ssize_t count;
} Tree;

static int read_tree(PyObject *levels, Tree *tree)
{
    if (!PyList_Check(levels) || PyList_GET_SIZE(levels) < 1 || PyList_GET_SIZE(levels) > MOST_LEVELS) {
        PyErr_SetString(PyExc_TypeError, "expected a list of levels");
        return -1;
    }
    tree->count = PyList_GET_SIZE(levels);
    for (Py_ssize_t i = 0; i < tree->count; i++) {
        PyObject *item = PyList_GET_ITEM(levels, i);
        if (!PyArray_Check(item) || PyArray_TYPE((PyArrayObject *)item) != NPY_DOUBLE
            || PyArray_NDIM((PyArrayObject *)item) != 1 || !PyArray_ISCARRAY((PyArrayObject *)item)) {
            PyErr_SetString(PyExc_TypeError, "expected levels that are contiguous arrays of float64");
            return -1;
        }
        tree->values[i] = PyArray_DATA((PyArrayObject *)item);
        tree->lengths[i] = PyArray_SIZE((PyArrayObject *)item);
        npy_intp above = i == 0 ? -1 : tree->lengths[i - 1] / WIDTH;
        if (tree->lengths[i] % WIDTH != 0 || tree->lengths[i] < above) {
            PyErr_SetString(PyExc_ValueError, "expected levels that are each as long as the blocks of the one below");
            return -1;
        }
    }
    if (tree->lengths[tree->count - 1] != WIDTH || tree->lengths[0] == 0) {
        PyErr_SetString(PyExc_ValueError, "expected a last level of a single block");
        return -1;
    }
    return 0;
}

/* The place in a block, with a chance in proportion to the values there. */
static inline npy_intp choose(const double *block, double uniform)
{
    double sums[WIDTH], sum = 0;
    for (int i = 0; i < WIDTH; i++) {
        sum += block[i];
        sums[i] = sum;
    }
    if (!(sum > 0))
        return 0;
    double target = uniform * sum;
    if (!(target < sum)) /* rounded up */
        target = 0;
    int place = 0;
    for (int i = 0; i < WIDTH; i++)
        place += sums[i] <= target;
    return place;
}

static const char find_doc[] =
    "find(levels, uniforms) -> array of intp\n\n"
    "Rows drawn with a chance in proportion to their values; uniforms has a row of draws for each level, the top first.";

static PyObject *find(PyObject *module, PyObject *const *arguments, Py_ssize_t argument_count)
{
    Tree tree;
    if (argument_count != 2 || !PyArray_Check(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "expected levels and an array of draws");
        return NULL;
    }
    if (read_tree(arguments[0], &tree) < 0)
        return NULL;
    PyArrayObject *uniforms = (PyArrayObject *)arguments[1];
    if (PyArray_TYPE(uniforms) != NPY_DOUBLE || PyArray_NDIM(uniforms) != 2 || !PyArray_ISCARRAY_RO(uniforms)
        || PyArray_DIM(uniforms, 0) != tree.count) {
        PyErr_SetString(PyExc_TypeError, "expected draws of float64, contiguous, a row for each level");
        return NULL;
    }
    npy_intp count = PyArray_DIM(uniforms, 1);
    PyObject *found = PyArray_SimpleNew(1, &count, NPY_INTP);
    if (found == NULL)
        return NULL;
    npy_intp *rows = PyArray_DATA((PyArrayObject *)found);
    const double *draws = PyArray_DATA(uniforms);
    Py_BEGIN_ALLOW_THREADS
    for (npy_intp start = 0; start < count; start += ABREAST) {
        npy_intp stop = start + ABREAST < count ? start + ABREAST : count;
        for (npy_intp i = start; i < stop; i++)
            rows[i] = 0;
        for (Py_ssize_t step = 0; step < tree.count; step++) {
            const double *values = tree.values[tree.count - 1 - step];
            const double *below = step + 1 < tree.count ? tree.values[tree.count - 2 - step] : NULL;
            npy_intp blocks_below = below == NULL ? 0 : tree.lengths[tree.count - 2 - step] / WIDTH;
            for (npy_intp i = start; i < stop; i++) {
                rows[i] = rows[i] * WIDTH + choose(values + rows[i] * WIDTH, draws[step * count + i]);
                if (below != NULL) {
                    if (rows[i] >= blocks_below) /* no sum of anything */
                        rows[i] = 0;
                    __builtin_prefetch(below + rows[i] * WIDTH);
                    __builtin_prefetch(below + rows[i] * WIDTH + WIDTH / 2);
                }
            }
        }
    }
    Py_END_ALLOW_THREADS
    return found;
}

static const char add_up_doc[] =
    "add_up(levels, rows) -> None\n\nAdd up the sums above these rows anew.";

static PyObject *add_up(PyObject *module, PyObject *const *arguments, Py_ssize_t argument_count)
{
    Tree tree;
    if (argument_count != 2 || !PyArray_Check(arguments[1])) {
        PyErr_SetString(PyExc_TypeError, "expected levels and an array of rows");
        return NULL;
    }
    if (read_tree(arguments[0], &tree) < 0)
        return NULL;
    PyArrayObject *index = (PyArrayObject *)arguments[1];
    if (PyArray_TYPE(index) != NPY_INTP || !PyArray_ISCARRAY_RO(index)) {
        PyErr_SetString(PyExc_TypeError, "expected rows of intp, contiguous");
        return NULL;
    }
    const npy_intp *rows = PyArray_DATA(index);
    npy_intp count = PyArray_SIZE(index);
    for (npy_intp i = 0; i < count; i++) {
        if ((npy_uintp)rows[i] >= (npy_uintp)tree.lengths[0]) {
            PyErr_SetString(PyExc_IndexError, "a row is out of range");
            return NULL;
        }
        const double *block = tree.values[0] + (rows[i] >> WIDTH_BITS) * WIDTH;
        __builtin_prefetch(block);
        __builtin_prefetch(block + WIDTH / 2);
    }
    for (Py_ssize_t level = 1; level < tree.count; level++)
        for (npy_intp i = 0; i < count; i++) {
            npy_intp node = rows[i] >> WIDTH_BITS * level; /* a division takes many times as long */
            if (i > 0 && node == rows[i - 1] >> WIDTH_BITS * level)
                continue;
            const double *block = tree.values[level - 1] + node * WIDTH;
            double sum = 0;
            for (int j = 0; j < WIDTH; j++)
                sum += block[j];
            tree.values[level][node] = sum;
        }
    Py_RETURN_NONE;
}


static PyMethodDef functions[] = {
    {"add_up", (PyCFunction)(void (*)(void))add_up, METH_FASTCALL, add_up_doc},
    {"find", (PyCFunction)(void (*)(void))find, METH_FASTCALL, find_doc},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef definition = {
    .m_base = PyModuleDef_HEAD_INIT,
    .m_name = "anystore.replay._sum_tree",
    .m_doc = "The sum tree of rows in main memory.",
    .m_size = -1,
    .m_methods = functions,
};

PyMODINIT_FUNC PyInit__sum_tree(void)
{
    import_array();
    return PyModule_Create(&definition);
}
