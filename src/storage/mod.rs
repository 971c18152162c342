//! Files and block devices, the io_uring engine, and the buffer pool.
