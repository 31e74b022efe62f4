from snapengine.engine.state cimport capture_t

# Counters of a capture, for Python. sum_counters may be called while the threads run, the others after they
# have ended.
cdef dict sum_counters(capture_t *capture)
cdef object count_final_pages(capture_t *capture)
cdef dict fault_quantiles(capture_t *capture)
cdef list fault_buckets(capture_t *capture)
cdef list list_lost_runs(capture_t *capture)
