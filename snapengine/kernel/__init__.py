"""Linux interfaces, one function per call: userfaultfd, pagemap, process_vm_readv, ptrace, /proc/PID/maps."""
