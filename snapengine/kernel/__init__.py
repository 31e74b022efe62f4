"""What Linux offers, one function a call: userfaultfd, pagemap, process_vm_readv, ptrace, /proc/PID/maps."""
