"""Runs of pages, and the resolution of overlapping runs: the newest wins. One thread at a time per object."""

from libc.stdlib cimport free, malloc, qsort, realloc
from libc.string cimport memset

from snapengine.image.format cimport SNAP_DATA


cdef bint newer(const run_t *a, const run_t *b) noexcept nogil:
    """Whether `a` comes later in the file than `b`."""
    return a.chunk > b.chunk or (a.chunk == b.chunk and a.entry > b.entry)


cdef int by_page(const void *a, const void *b) noexcept nogil:
    cdef const run_t *left = <const run_t *>a
    cdef const run_t *right = <const run_t *>b
    if left.page != right.page:
        return 1 if left.page > right.page else -1
    return 1 if newer(left, right) else -1


cdef void push(run_t **heap, size_t count, run_t *item) noexcept nogil:
    """Add an item to a heap of `count` items; the newest is on top."""
    cdef size_t at = count
    while at and newer(item, heap[(at - 1) // 2]):
        heap[at] = heap[(at - 1) // 2]
        at = (at - 1) // 2
    heap[at] = item


cdef void pop(run_t **heap, size_t count) noexcept nogil:
    """Remove the top of a heap of `count` items."""
    cdef run_t *item = heap[count - 1]
    cdef size_t at = 0
    cdef size_t child
    count -= 1
    while 2 * at + 1 < count:
        child = 2 * at + 1
        if child + 1 < count and newer(heap[child + 1], heap[child]):
            child += 1
        if newer(item, heap[child]):
            break
        heap[at] = heap[child]
        at = child
    if count:
        heap[at] = item


cdef class Runs:
    """Runs of pages in ascending order. Iteration yields (page, pages, kind), with adjacent runs merged."""

    def __dealloc__(self):
        free(self.runs)

    cdef int append(self, const run_t *run) noexcept nogil:
        cdef size_t capacity = max(<size_t>64, 2 * self.capacity)
        cdef run_t *grown
        if self.count == self.capacity:
            grown = <run_t *>realloc(self.runs, capacity * sizeof(run_t))
            if grown == NULL:
                return -1
            self.runs = grown
            self.capacity = capacity
        self.runs[self.count] = run[0]
        self.count += 1
        return 0

    def __len__(self):
        return self.count

    def __iter__(self):
        cdef size_t i = 0
        cdef run_t run
        while i < self.count:
            run = self.runs[i]
            i += 1
            while i < self.count and self.runs[i].kind == run.kind:
                if self.runs[i].page != run.page + run.pages:
                    break
                run.pages += self.runs[i].pages
                i += 1
            yield run.page, run.pages, run.kind

    def first_gap(self, uint64_t first, uint64_t end):
        """The first page in [first, end) that no run covers, or None."""
        cdef size_t i
        for i in range(self.count):
            if self.runs[i].page > first:
                break
            first = self.runs[i].page + self.runs[i].pages
        return first if first < end else None

    def first_of(self, uint32_t kind):
        """The first page of that kind, or None."""
        cdef size_t i
        for i in range(self.count):
            if self.runs[i].kind == kind:
                return self.runs[i].page
        return None

    def totals(self):
        """Pages of each kind: [data, zero, hole, lost]."""
        cdef uint64_t[4] pages
        cdef size_t i
        memset(pages, 0, sizeof(pages))
        for i in range(self.count):
            pages[self.runs[i].kind] += self.runs[i].pages
        return [pages[0], pages[1], pages[2], pages[3]]


cdef bint is_disjoint(Runs items) noexcept nogil:
    cdef size_t i
    for i in range(1, items.count):
        if items.runs[i].page < items.runs[i - 1].page + items.runs[i - 1].pages:
            return False
    return True


cdef int sweep(Runs items, Runs into) noexcept nogil:
    """Append the newest run of each page of `items`, sorted by page. Returns 0, or -1: out of memory."""
    cdef run_t **heap = <run_t **>malloc(items.count * sizeof(run_t *))
    cdef size_t heap_count = 0
    cdef size_t next_item = 0
    cdef int err = 0
    cdef uint64_t page = 0
    cdef uint64_t end
    cdef run_t part
    if heap == NULL:
        return -1
    while err == 0:
        while heap_count and heap[0].page + heap[0].pages <= page:
            pop(heap, heap_count)
            heap_count -= 1
        if heap_count == 0:
            if next_item == items.count:
                break
            page = items.runs[next_item].page
        while next_item < items.count and items.runs[next_item].page <= page:
            push(heap, heap_count, &items.runs[next_item])
            heap_count += 1
            next_item += 1
        if heap[0].page + heap[0].pages <= page:
            continue
        end = heap[0].page + heap[0].pages
        if next_item < items.count:
            end = min(end, items.runs[next_item].page)
        part = heap[0][0]
        part.data_page += <uint32_t>(page - part.page) if part.kind == SNAP_DATA else 0
        part.page = page
        part.pages = end - page
        err = into.append(&part)
        page = end
    free(heap)
    return err


cdef Runs newest(Runs items):
    """The newest run of each page of `items`, ascending. May sort and return `items` itself."""
    cdef Runs result = Runs()
    cdef bint disjoint
    cdef int err = 0
    with nogil:
        if not is_disjoint(items):
            qsort(items.runs, items.count, sizeof(run_t), by_page)
        disjoint = is_disjoint(items)
        if not disjoint:
            err = sweep(items, result)
    if err:
        raise MemoryError
    return items if disjoint else result
